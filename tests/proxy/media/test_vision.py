"""Tokens as `transformers`' own processors count them, and work as the towers' multiplications do."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_frames
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_film

from engines.encoder.media import MediaReader
from engines.encoder.model import VisionModel
from engines.encoder.request import MediaItem
from engines.settings import EncoderSettings
from proxy.media import formats, vision
from proxy.media.formats import Shape
from proxy.media.vision import DEFAULT, FAMILIES, Vision
from tests.support.checkpoints import checkpoint
from tests.support.films import video_file

sides = st.integers(1, 6000)
SIZES = [(640, 360), (1280, 720), (1920, 1080), (2000, 2000), (3840, 2160), (4032, 3024)]


def picture(width: int, height: int) -> Shape:
    return Shape("image", 1, width, height)


def read(family: str, name: str) -> Any:
    return json.loads((checkpoint(family) / name).read_text())


@cache
def processor(family: str, released: bool) -> Any:
    """Of the tiny checkpoint, or with the areas of the released ones."""
    found = AutoImageProcessor.from_pretrained(checkpoint(family))
    if released:
        found.size = {"shortest_edge": FAMILIES[family].min_pixels, "longest_edge": FAMILIES[family].max_pixels}
    return found


def of_checkpoint(family: str) -> Vision:
    files = [read(family, f"{name}preprocessor_config.json") for name in ("", "video_")]
    return vision.vision(family, read(family, "config.json")["vision_config"], *files, itemsize=4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("released", [False, True])
@settings(max_examples=60, deadline=None)
@given(width=sides, height=sides)
def test_tokens_of_an_image_are_those_of_its_processor(family: str, released: bool, width: int, height: int) -> None:
    mine = FAMILIES[family] if released else of_checkpoint(family)
    if max(width, height) > 200 * min(width, height):
        assert 0 < mine.tokens(picture(width, height)) <= mine.max_pixels // (mine.patch * mine.merge) ** 2
        return
    own = processor(family, released)
    patches = own.get_number_of_image_patches(height, width)
    assert mine.tokens(picture(width, height)) == patches // own.merge_size**2


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(4, 768))
def test_tokens_of_a_video_are_those_of_its_processor(width: int, height: int, frames: int) -> None:
    shape = Shape("video", 1, width, height, None, frames / 2)
    if max(width, height) > 200 * min(width, height):
        assert all(family.tokens(shape) > 0 for family in FAMILIES.values())
        return
    of_frames = resize_frames(height, width, 28, 128 * 784, 768 * 784)
    assert FAMILIES["qwen2_5_vl"].tokens(shape) == math.ceil(frames / 2) * math.prod(of_frames) // 784
    if min(width, height) >= 32 or max(width, height) / min(width, height) < 100:  # it refuses what it has stretched
        film = resize_film(frames, height, width, 2, 32, 4096, 25165824)
        assert FAMILIES["qwen3_vl"].tokens(shape) == math.ceil(frames / 2) * math.prod(film) // 1024


@pytest.mark.parametrize(
    ("seconds", "frames", "sampled"), [(10, 250, 20), (0.5, 12, 4), (0.1, 2, 2), (1e6, None, 768), (100, 120, 120)]
)
def test_videos_are_sampled_twice_a_second(seconds: float, frames: int | None, sampled: int) -> None:
    shape = Shape("video", 1, 640, 360, frames, seconds)
    assert DEFAULT.tokens(shape) == sampled // 2 * DEFAULT.tokens(Shape("image", 1, 640, 360))


def test_checkpoints_tell_their_numbers() -> None:
    found = of_checkpoint("qwen3_vl")
    assert (found.patch, found.merge, found.embedding_bytes) == (16, 2, 256 * (1 + 2) * 4)
    assert (found.min_pixels, found.max_pixels) == (4096, 1024 * 1024)
    assert of_checkpoint("qwen2_vl").embedding_bytes == 256 * 4


# TFLOP of an image, from the towers' published sizes; (attention over the whole image, all of it).
@pytest.mark.parametrize(
    ("family", "told"),
    [
        (
            "qwen2_5_vl",
            {(640, 360): 1.58, (1280, 720): 6.66, (1920, 1080): 16.3, (3840, 2160): 91.1, (4032, 3024): 160},
        ),
        (
            "qwen3_vl",
            {(1280, 720): 4.66, (1920, 1080): 15.5, (2000, 2000): 43.1, (3840, 2160): 161.5, (4032, 3024): 321},
        ),
    ],
)
def test_work_grows_as_the_towers_multiplications(family: str, told: dict[tuple[int, int], float]) -> None:
    work = {size: FAMILIES[family].work(picture(*size)) for size in told}
    scale = told[1280, 720] / work[1280, 720]
    for size, teraflop in told.items():
        assert work[size] * scale == pytest.approx(teraflop, rel=0.025), size


def test_released_embeddings_have_their_bytes() -> None:
    wider = vision.vision("qwen3_vl", {"out_hidden_size": 2048})
    assert (FAMILIES["qwen2_5_vl"].embedding_bytes, wider.embedding_bytes) == (7168, 16384)


def test_frames_do_not_attend_to_each_other() -> None:
    family = FAMILIES["qwen3_vl"]
    film, frame = Shape("video", 1, 640, 360, 8, 4.0), picture(640, 360)
    assert family.tokens(film) == 4 * family.tokens(frame)
    assert family.work(film) == pytest.approx(4 * family.work(frame), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_one_look_prices_as_two_do(family: Vision) -> None:
    for shape in (None, picture(1280, 720), Shape("video", 99, None, None, None, 9.0), Shape("audio", 9, seconds=3.0)):
        assert family.price(shape) == (family.tokens(shape), family.work(shape))


def test_what_is_not_known_is_guessed() -> None:
    assert DEFAULT.tokens(None) == DEFAULT.tokens(Shape("image", 99)) == vision.UNKNOWN_TOKENS
    assert DEFAULT.tokens(Shape("video", 512 * 100)) == 100
    assert DEFAULT.tokens(Shape("video")) == vision.UNKNOWN_TOKENS
    assert DEFAULT.tokens(Shape("audio", 640 * 9)) == 9
    assert DEFAULT.tokens(Shape("audio", 1 << 40)) == 16384
    assert DEFAULT.tokens(Shape("audio", 99, seconds=2.5)) == 63
    assert DEFAULT.tokens(Shape("video", 99, seconds=4.0)) == 4 * DEFAULT.tokens(Shape("video", 9, 1280, 720, 2, 1.0))


def test_a_grid_is_priced_as_the_image_behind_it() -> None:
    for family in FAMILIES.values():
        shape = picture(640, 640)
        side = round(math.sqrt(family.tokens(shape))) * family.merge
        assert family.price_of((1, side, side)) == family.price(shape)


def test_a_clients_bounds_hold() -> None:
    shape = picture(1280, 720)
    assert DEFAULT.bounded({"max_pixels": 28 * 28 * 100}).tokens(shape) <= 100
    assert DEFAULT.bounded({"size": {"longest_edge": 28 * 28 * 100}}).tokens(shape) <= 100
    assert DEFAULT.bounded({"min_pixels": 28 * 28 * 5000}).tokens(shape) >= 5000
    for odd in (None, [], {}, {"max_pixels": -1}, {"max_pixels": "9"}, {"size": 4}, {"min_pixels": True}):
        assert DEFAULT.bounded(odd) is DEFAULT
    assert DEFAULT.bounded({"min_pixels": 10**400}) is DEFAULT
    for odd in ({"fps": "2"}, {"fps": 0}, {"fps": float("nan")}, {"num_frames": 2.5}, {"num_frames": 10**9}):
        assert DEFAULT.bounded(odd) is DEFAULT


def test_a_client_says_how_a_video_is_seen() -> None:
    film = Shape("video", 1, 640, 360, 300, 10.0)
    assert DEFAULT.bounded({"fps": 1}).tokens(film) * 2 == DEFAULT.tokens(film)
    assert DEFAULT.bounded({"num_frames": 8}).tokens(film) * 5 == DEFAULT.tokens(film) * 2
    assert DEFAULT.bounded({"max_pixels": 28 * 28 * 100}).tokens(film) <= 1000


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 32), st.floats(1e-9, 1e9), st.sampled_from(["image", "video"]))
def test_no_claim_makes_a_load_without_bounds(width: int, height: int, seconds: float, modality: str) -> None:
    for family in FAMILIES.values():
        tokens, work = family.price(Shape(modality, 1, width, height, None, seconds))
        assert 0 < tokens <= 384 * 25000 and 0 < work < sys.maxsize


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl"),
        ("Qwen2.5-VL-72B-AWQ", "qwen2_5_vl"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl_moe", "qwen3_vl"),
        ("Qwen3-VL-30B-A3B", "qwen3_vl"),
        ("Qwen3.5-35B-A3B", "qwen3_vl"),
        ("Qwen2.5-7B-Instruct", None),
        ("llama", None),
        ("", None),
    ],
)
def test_names_tell_their_family(name: str, family: str | None) -> None:
    assert vision.family_of(name) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_encoder_tells_of_itself_is_what_its_files_say(family: str) -> None:
    reader = MediaReader(checkpoint(family), EncoderSettings(model=checkpoint(family)))
    said = {**VisionModel.load(checkpoint(family)).numbers(), **reader.numbers()}
    released, mine = FAMILIES[family], of_checkpoint(family)
    assert vision.told(json.loads(json.dumps(said))) == mine
    del said["video_processor"]
    older = replace(mine, video_min=released.video_min, video_max=released.video_max)
    assert vision.told(said) == older, "which encodes no videos"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("container", ["mp4", "mov", "webm", "matroska", "avi"])
def test_a_video_is_predicted_to_become_what_its_encoder_makes_of_it(family: str, container: str) -> None:
    reader = MediaReader(checkpoint(family), EncoderSettings(model=checkpoint(family)))
    mine = vision.told({**VisionModel.load(checkpoint(family)).numbers(), **reader.numbers()})
    assert mine is not None
    for film in (video_file(container=container), video_file(25, (320, 180), 5, seed=3, container=container)):
        made = reader.read(film, MediaItem(0, "p", "u", modality="video"))
        assert mine.tokens(formats.measure("video", film, len(film))) == made.tokens


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "toy"},
        {"vision_config": 3},
        {"vision_config": {"depth": "many"}},
        {"vision_config": {"patch_size": -14}},
        {"vision_config": {"hidden_size": 0}},
        {"image_processor": 3},
        {"image_processor": {"patch_size": [1]}},
        {"image_processor": {"merge_size": float("inf")}},
        {"video_processor": {"fps": "often"}},
        {"itemsize": "x"},
    ],
)
def test_what_makes_no_sense_is_not_believed(change: dict[str, Any]) -> None:
    said = {"model_type": "qwen3_vl", "vision_config": {}, "image_processor": {}, "itemsize": 2}
    assert vision.told(said) == FAMILIES["qwen3_vl"]
    assert vision.told(said | change) is None
    assert vision.told("qwen3_vl") is None
