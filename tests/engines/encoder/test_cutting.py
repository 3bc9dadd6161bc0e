"""Cutters: patches of an image's own size, or tiles of one size, as the checkpoint's processor makes them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from bench.pictures import draw
from engines.encoder.cutting import GridCutter, TileCutter, cutter_of
from engines.errors import BadRequest
from tests.support.checkpoints import checkpoint

SHAPES = ((320, 160), (112, 112), (60, 300), (500, 400), (3, 2))


def picture(width: int, height: int) -> Image.Image:
    return draw(width, height, seed=width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_those_of_the_processor(shape: tuple[int, int]) -> None:
    cutter = cutter_of(checkpoint("internvl"))
    assert isinstance(cutter, TileCutter)
    cut = cutter.cut(picture(*shape), {})
    processor = AutoImageProcessor.from_pretrained(checkpoint("internvl"))
    wanted = processor(images=[picture(*shape)], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(cut.pixels, wanted)
    assert cut.grid == (len(wanted), 8, 8) and cut.tokens == 16 * len(wanted)
    assert cut.patches == 64 * len(wanted) <= cutter.patches(shape[0] * shape[1], {})


def test_tiles_follow_from_the_shape_and_not_from_bounds() -> None:
    with pytest.raises(BadRequest, match="no bounds of pixels"):
        cutter_of(checkpoint("internvl")).cut(picture(32, 32), {"longest_edge": 5000})


def test_numbers_are_those_of_the_files() -> None:
    assert cutter_of(checkpoint("internvl")).numbers() == {"tile": [112, 112], "tile_tokens": 16, "max_tiles": 6}
    told = cutter_of(checkpoint("qwen3_vl")).numbers()
    assert (told["patch_size"], told["merge_size"]) == (16, 2)


def test_patches_keep_within_the_bounds_of_a_request() -> None:
    cutter = cutter_of(checkpoint("qwen3_vl"))
    assert isinstance(cutter, GridCutter)
    free, bound = cutter.cut(picture(640, 480), {}), cutter.cut(picture(640, 480), {"longest_edge": 64_000})
    assert bound.tokens < free.tokens == 300
    assert bound.patches <= cutter.patches(640 * 480, {"longest_edge": 64_000}) == 250
