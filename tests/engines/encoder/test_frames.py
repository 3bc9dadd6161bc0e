"""Which frames, how large, and as which patches: what transformers' processors compute.

What cannot be taken out of their source, resizing and rescaling, was held against transformers 5.23 with torchvision
0.28 bit by bit; here it is held against Pillow's resizing, whose rounding is another, and against the formula.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from engines.encoder.frames import Film, film_cutter_of, processor_file
from engines.errors import BadRequest, SetupError
from tests.support.checkpoints import FAMILIES as GRIDDED
from tests.support.checkpoints import checkpoint
from tests.support.pictures import draw
from tests.support.their_videos import Processor

FAMILIES = (*GRIDDED, "internvl")
RULES = {"temporal_patch_size": 2, "merge_size": 2, "min_frames": 4, "max_frames": 768}
FPS = st.sampled_from([1.0, 5.0, 23.976, 24.0, 29.97002997, 30.0, 60.0])


@cache
def ours(family: str, folder: Path | None = None) -> Any:
    return film_cutter_of(folder or checkpoint(family), AutoConfig.from_pretrained(checkpoint(family)))


@cache
def theirs(family: str, **changes: Any) -> Processor:
    said = {**RULES, **processor_file(checkpoint(family)), **changes}
    if family == "internvl":
        return Processor(family, **{"num_frames": None, "initial_shift": True, **changes})
    return Processor(family, **said)


def folder_with(tmp_path: Path, family: str, **changes: Any) -> Path:
    said = {**processor_file(checkpoint(family)), **changes}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(said))
    return tmp_path


# ---- which frames


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(GRIDDED), st.integers(2, 4000), FPS, st.sampled_from([0.25, 1, 2, 4.5, 30]))
def test_frames_by_the_second_are_theirs(family: str, frames: int, fps: float, wanted: float) -> None:
    chosen = ours(family).choose(Film(frames, fps, 64, 64), {"fps": wanted})
    assert chosen == [n for n in theirs(family).indices(frames, fps, fps=wanted) if n < frames]


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(FAMILIES), st.integers(2, 900), FPS, st.integers(2, 60))
def test_frames_by_number_are_theirs(family: str, frames: int, fps: float, wanted: int) -> None:
    chosen = ours(family).choose(Film(frames, fps, 64, 64), {"num_frames": wanted})
    if wanted + wanted % 2 <= frames:
        assert chosen == [n for n in theirs(family).indices(frames, fps, num_frames=wanted) if n < frames]
    else:  # transformers refuses, or names a frame twice
        assert chosen == sorted(set(chosen)) and len(chosen) >= min(wanted, frames) - 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_no_frame_is_seen_behind_the_last(family: str) -> None:
    assert theirs(family).indices(179, 1.0, fps=1)[-1] == 179  # where 179 / 178 was rounded down
    assert ours(family).choose(Film(179, 1.0, 64, 64), {"fps": 1}) == list(range(178))


@pytest.mark.parametrize("family", GRIDDED)
def test_two_a_second_where_nobody_says_more(family: str) -> None:
    film = Film(300, 30.0, 64, 64)
    assert (
        ours(family).choose(film, {}) == ours(family).choose(film, {"fps": 2}) == theirs(family).indices(300, 30, fps=2)
    )


def test_as_many_as_the_file_says(tmp_path: Path) -> None:
    film = Film(300, 30.0, 64, 64)
    assert ours("internvl").choose(film, {}) == theirs("internvl").indices(300, 30.0, num_frames=8)
    assert len(ours("internvl").choose(film, {"fps": 2})) == 20
    folder = folder_with(tmp_path, "qwen2_vl", num_frames=6)
    assert len(ours("qwen2_vl", folder).choose(film, {})) == 6
    assert len(ours("qwen2_vl", folder).choose(film, {"fps": 1})) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_frame_is_enough(family: str) -> None:
    film = Film(1, 25.0, 64, 64)
    cutter = ours(family)
    assert cutter.choose(film, {}) == [0]
    frames = torch.stack([cutter.resize(torch.zeros(3, 64, 64, dtype=torch.uint8), cutter.size(film, 1, {}))])
    t, h, w = cutter.grid(1, tuple(frames.shape[2:]))
    assert t == 1 and len(cutter.cut(frames)) == (1 if family == "internvl" else h * w)


# ---- how large


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(GRIDDED), st.integers(2, 800), st.integers(8, 2200), st.integers(8, 2200), st.booleans(),
    st.sampled_from([{}, {"shortest_edge": 200_000}, {"longest_edge": 30_000}]),
)  # fmt: skip
def test_sizes_are_theirs(family: str, frames: int, height: int, width: int, cap: bool, bounds: dict[str, int]) -> None:
    cutter = copy.copy(ours(family))
    cutter._told = {
        **cutter._told,
        "cap_pixels_per_frame": cap,
        "max_video_tokens": 3000 if family != "qwen3_vl" else 9,
    }
    processor = theirs(family, max_video_tokens=cutter._told["max_video_tokens"])
    film = Film(frames, 24.0, width, height)
    try:
        expected = processor.size(frames, height, width, {**cutter.numbers()["size"], **bounds}, cap)
    except ValueError:  # beyond 1:200
        with pytest.raises(BadRequest, match="sides beyond"):
            cutter.size(film, frames, bounds)
        return
    assert cutter.size(film, frames, bounds) == expected


def test_bounds_by_their_older_names(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "qwen2_vl", min_pixels=4000, max_pixels=90_000)
    assert ours("qwen2_vl", folder).numbers()["size"] == {"shortest_edge": 4000, "longest_edge": 90_000}


def test_tiles_have_one_size_and_no_bounds() -> None:
    assert ours("internvl").size(Film(9, 3.0, 640, 48), 9, {}) == (112, 112)
    with pytest.raises(BadRequest, match="no bounds"):
        ours("internvl").size(Film(9, 3.0, 640, 48), 9, {"longest_edge": 9})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(56, 84), (180, 300)], ids=["down", "up"])
def test_frames_are_resized_as_pillow_would(family: str, size: tuple[int, int]) -> None:
    picture = draw(120, 90, seed=7)
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    expected = torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1)
    got = ours(family).resize(frame, size)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert ours(family).resize(frame, (90, 120)) is frame


# ---- as which patches


@pytest.mark.parametrize("family", GRIDDED)
@pytest.mark.parametrize("count", [4, 5])
def test_patches_are_theirs(family: str, count: int) -> None:
    cutter, said = ours(family), processor_file(checkpoint(family))
    edge = 4 * said["patch_size"]
    frames = torch.randint(
        0, 256, (count, 3, edge, 2 * edge), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    mean, std = (torch.tensor(said[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    patches, grid = theirs(family).patches((frames / 255 - mean) / std)
    assert cutter.grid(count, (edge, 2 * edge)) == grid == ((count + 1) // 2, 4, 8)
    torch.testing.assert_close(cutter.cut(frames), patches, rtol=0, atol=2e-6)


def test_frames_are_tiles() -> None:
    cutter = ours("internvl")
    frames = torch.full((3, 3, 112, 112), 255, dtype=torch.uint8)
    assert cutter.grid(3, (112, 112)) == (3, 8, 8)
    assert cutter.cut(frames).shape == (3, 3, 112, 112)
    torch.testing.assert_close(
        cutter.cut(frames)[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


# ---- when


@pytest.mark.parametrize("chosen", [[0, 3, 6, 9], [0, 12, 24], [5]])
def test_times_are_theirs(chosen: list[int]) -> None:
    clip = ours("qwen3_vl").clip(Film(30, 23.976, 64, 64), chosen)
    expected = Qwen3VLProcessor._calculate_timestamps(SimpleNamespace(), list(chosen), 23.976, 2)
    assert list(clip.timestamps) == expected
    metadata = VideoMetadata(total_num_frames=30, fps=23.976, frames_indices=chosen)
    assert clip.spacing == 2 / metadata.sampled_fps


def test_each_tile_is_its_own_step() -> None:
    clip = ours("internvl").clip(Film(20, 10.0, 64, 64), [0, 10])
    assert clip.timestamps == (0.0, 1.0) and clip.spacing == 1.0


# ---- files


def test_the_images_processor_stands_in(tmp_path: Path) -> None:
    assert processor_file(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    assert processor_file(tmp_path) == {"patch_size": 14}
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 15}')
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 16}')
    assert processor_file(tmp_path) == {"patch_size": 15}
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"patch_size": 16}}')
    assert processor_file(tmp_path) == {"patch_size": 16}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen2_vl", {"resample": 1}, "filter 1"),
        ("internvl", {"size": {"height": 448, "width": 448}}, "not the tower's"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(
    tmp_path: Path, family: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SetupError, match=told):
        ours(family, folder_with(tmp_path, family, **changes))


def test_a_family_without_videos_is_refused() -> None:
    with pytest.raises(SetupError, match="videos of 'gemma3' are not known"):
        film_cutter_of(Path("m"), SimpleNamespace(model_type="gemma3"))
