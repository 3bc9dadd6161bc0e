"""What encoders tell of media that the proxy has not seen."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.core import Handle, Item
from proxy.media.formats import Shape
from proxy.media.sizes import Sizes, grid_of


def item(identity: str = "https://h/a.png", modality: str = "image", mm_hash: str | None = None) -> Item:
    return Item(0, 0, 0, modality, {}, mm_hash, identity, 1)


def handle(**metadata: Any) -> Handle:
    return Handle("hash", "image", metadata, {})


def test_a_url_is_known_once_an_encoder_has_told() -> None:
    sizes = Sizes()
    assert sizes.find("https://h/a.png") is None
    sizes.learn(item(), handle(image_grid_thw=[1, 46, 80]))
    assert sizes.find("https://h/a.png") == (1, 46, 80)
    sizes.learn(item(), handle(image_grid_thw=[1, 4, 8]))
    assert sizes.find("https://h/a.png") == (1, 4, 8), "there may be another image now"


def test_what_the_proxy_knows_better_is_not_kept() -> None:
    sizes = Sizes()
    sizes.learn(item("hash", "image", "hash"), handle(image_grid_thw=[1, 46, 80]))
    sizes.learn(item("data:image/png;base64," + "A A" * 9999), handle(image_grid_thw=[1, 46, 80]))
    assert len(sizes) == 0
    sizes.learn(item("film", "video", "film"), handle(video_grid_thw=[5, 46, 80]))
    assert sizes.find("film") == (5, 46, 80), "of a video a header tells less"


def test_an_encoders_word_comes_before_a_look() -> None:
    sizes, seen = Sizes(), Shape("image", 99, 640, 480)
    sizes.measured(item(), seen)
    assert sizes.find(item().identity) == seen
    sizes.learn(item(), handle(image_grid_thw=[1, 46, 80]))
    sizes.measured(item(), seen)
    assert sizes.find(item().identity) == (1, 46, 80)


def test_what_was_told_longest_ago_goes_first() -> None:
    sizes = Sizes(capacity=2)
    for name in ("a", "b", "a", "c"):
        sizes.learn(item(name), handle(image_grid_thw=[1, 2, 2]))
    assert [name for name in "abc" if sizes.find(name)] == ["a", "c"]


@pytest.mark.parametrize(
    ("metadata", "grid"),
    [
        ({"image_grid_thw": [[1, 4, 6]]}, (1, 4, 6)),
        ({"x": 1, "video_grid_thw": [3, 4, 6], "second_per_grid_ts": 1.0}, (3, 4, 6)),
        ({"image_grid_thw": [[1, 4, 6], [1, 4, 6]]}, None),
        ({"image_grid_thw": [1, 4]}, None),
        ({"image_grid_thw": [1, 0, 4]}, None),
        ({"image_grid_thw": [1, "4", 4]}, None),
        ({"image_grid_thw": None}, None),
        ({}, None),
    ],
)
def test_grids_are_found_in_metadata(metadata: dict[str, Any], grid: tuple[int, int, int] | None) -> None:
    assert grid_of(metadata) == grid
