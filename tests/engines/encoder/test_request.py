"""The wire contract of the encoder: what is read, what is refused, what is answered."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engines.encoder.frames import Clip
from engines.encoder.request import Embedding, MediaItem, answer, parse
from engines.errors import BadRequest

HASH = "0123456789abcdef" * 4


def image(url: Any = "data:,x", **extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **extra}


def video(url: Any = "data:,x", **extra: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **extra}


def body(*parts: Any, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **extra}


def test_items_are_numbered_through_all_messages_and_text_is_skipped() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "look"}, image("a", uuid=HASH)]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "b"}, video("c", uuid=HASH)]},
    ]
    assert parse({"messages": messages, "max_tokens": 1, "unknown": {}}, 8) == [
        MediaItem(0, "messages[1].content[1]", "a", HASH),
        MediaItem(1, "messages[2].content[0]", "b"),
        MediaItem(2, "messages[2].content[1]", "c", HASH, modality="video"),
    ]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (body("text"), "messages[0].content[0]"),
        (body(image(), {"type": "video", "video": "x"}), "messages[0].content[1]"),
        (body(image(), video("")), "messages[0].content[1]"),
        (body({"type": ["image_url"]}), "messages[0].content[0]"),
        (body({"type": "image_embeds", "image_embeds": {}}), "messages[0].content[0]"),
        (body({"type": "image_url"}), "messages[0].content[0]"),
        (body({"type": "image_url", "image_url": None, "uuid": HASH}), "messages[0].content[0]"),
        (body(image(5)), "messages[0].content[0]"),
        (body(image(uuid="../../etc")), "messages[0].content[0]"),
        (body(image(uuid=HASH.upper())), "messages[0].content[0]"),
        (body(image(uuid=HASH + "\n")), "messages[0].content[0]"),
        (body(*[image()] * 9), "messages"),
        (body(image(), stream=True), "stream"),
        (body(image(), media_io_kwargs={"num_frames": 2}), "media_io_kwargs"),
        (body(image(), mm_processor_kwargs=[]), "mm_processor_kwargs"),
        (body(video(), mm_processor_kwargs={"fps": 0}), "mm_processor_kwargs.fps"),
        (body(video(), mm_processor_kwargs={"fps": "2"}), "mm_processor_kwargs.fps"),
        (body(video(), mm_processor_kwargs={"num_frames": 2.5}), "mm_processor_kwargs.num_frames"),
        (body(video(), mm_processor_kwargs={"num_frames": 10**9}), "mm_processor_kwargs.num_frames"),
        (body(video(), mm_processor_kwargs={"num_frames": 8, "fps": 2}), "mm_processor_kwargs"),
        (body(video(), mm_processor_kwargs={"max_frames": 8}), "mm_processor_kwargs.max_frames"),
        (body(image(), mm_processor_kwargs={"min_pixels": "many"}), "mm_processor_kwargs.min_pixels"),
        (body(image(), mm_processor_kwargs={"max_pixels": True}), "mm_processor_kwargs.max_pixels"),
        (body(image(), mm_processor_kwargs={"size": {"height": 2}}), "mm_processor_kwargs.size.height"),
        (body(image(), mm_processor_kwargs={"size": {"min_pixels": 2}}), "mm_processor_kwargs.size.min_pixels"),
        (body(image(), mm_processor_kwargs={"size": 5}), "mm_processor_kwargs.size"),
        (body(image(), mm_processor_kwargs={"min_pixels": 9, "max_pixels": 3}), "mm_processor_kwargs"),
    ],
)
def test_what_is_refused_names_its_place(given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(given, 8)
    assert caught.value.param == param


def test_other_modalities_are_named() -> None:
    with pytest.raises(BadRequest, match="not input_audio: none of its models has audio") as caught:
        parse(body({"type": "input_audio", "input_audio": {}}), 8)
    assert caught.value.code == "unsupported_modality"


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        (None, {}),
        ({}, {}),
        ({"size": None}, {}),
        ({"min_pixels": 10, "max_pixels": 20}, {"shortest_edge": 10, "longest_edge": 20}),
        ({"size": {"longest_edge": 20}}, {"longest_edge": 20}),
        ({"min_pixels": 5, "size": {"longest_edge": 20}}, {"shortest_edge": 5, "longest_edge": 20}),
    ],
)
def test_pixel_bounds(kwargs: dict[str, Any] | None, size: dict[str, int]) -> None:
    assert parse(body(image(), mm_processor_kwargs=kwargs), 8)[0].size == size


def test_bounds_change_the_identity() -> None:
    plain, small = MediaItem(0, "p", "u"), MediaItem(0, "p", "u", size={"longest_edge": 1})
    other_order = MediaItem(0, "p", "u", size={"longest_edge": 1, "shortest_edge": 2})
    assert plain.key(HASH) == HASH
    assert len({plain.key(HASH), small.key(HASH), other_order.key(HASH)}) == 3
    assert small.key(HASH) != small.key(HASH[::-1])
    same = MediaItem(5, "q", "v", size={"shortest_edge": 2, "longest_edge": 1})
    assert same.key(HASH) == other_order.key(HASH)
    assert len(small.key(HASH)) == 64


def test_a_video_may_be_seen_otherwise_than_its_model_would() -> None:
    read = parse(body(image(), video(), mm_processor_kwargs={"fps": 0.5, "max_pixels": 20}), 8)
    assert [(item.modality, item.sampling, item.size) for item in read] == [
        ("image", {}, {"longest_edge": 20}),
        ("video", {"fps": 0.5}, {"longest_edge": 20}),
    ]


def test_sampling_and_modality_change_the_identity() -> None:
    """One GIF is both an image and a video."""
    items = [
        MediaItem(0, "p", "u"),
        MediaItem(0, "p", "u", modality="video"),
        MediaItem(0, "p", "u", modality="video", sampling={"fps": 1}),
        MediaItem(0, "p", "u", modality="video", sampling={"num_frames": 1}),
    ]
    assert len({item.key(HASH) for item in items}) == 4


def test_the_answer_for_a_video_tells_its_times() -> None:
    found = Embedding((2, 4, 4), 8, "float32", (8, 128), {}, Clip((0.25, 1.25), 1.0))
    entry = answer("r", "M", 7, [MediaItem(0, "p", "u", modality="video")], [("x", found, False)])
    assert entry["ec_transfer_params"]["x"]["modality"] == "video"
    metadata = {"video_grid_thw": [2, 4, 4], "second_per_grid_ts": 1.0, "timestamps": [0.25, 1.25]}
    assert entry["ec_transfer_params"]["x"]["metadata"] == metadata


def test_what_is_known_of_a_video_outlasts_json() -> None:
    """The embedding store keeps it so."""
    found = Embedding((2, 4, 4), 8, "float32", (8, 128), {}, Clip((0.25, 1.25), 1.0))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Embedding) == found


def test_the_answer_groups_repeated_items() -> None:
    a = Embedding((1, 6, 8), 12, "float32", (12, 128), {"where": "A"})
    b = Embedding((1, 2, 2), 1, "float32", (1, 128), {"where": "B"})
    items = [MediaItem(n, f"p{n}", "u") for n in range(3)]
    reply = answer("req:0", "M", 7, items, [("x", a, False), ("y", b, True), ("x", a, False)])
    assert reply["id"] == "chatcmpl-req:0"
    assert reply["usage"] == {"prompt_tokens": 25, "completion_tokens": 0, "total_tokens": 25}
    assert list(reply["ec_transfer_params"]) == ["x", "y"]
    assert reply["ec_transfer_params"]["x"] == {
        "modality": "image",
        "item_indices": [0, 2],
        "metadata": {"image_grid_thw": [1, 6, 8]},
        "num_tokens": 12,
        "dtype": "float32",
        "shape": [12, 128],
        "where": {"where": "A"},
        "cached": False,
    }
