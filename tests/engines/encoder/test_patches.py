"""Bit by bit what transformers' own processor makes of the same image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from engines.encoder.patches import Patches, known
from tests.support.checkpoints import FAMILIES, checkpoint

SIZES = [(28, 28), (33, 17), (300, 200), (57, 731), (640, 480)]


def every_value(width: int, height: int) -> Image.Image:
    """Neighbours far apart, so that resizing goes over every value, and beyond what bytes hold on both sides."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.reshape(-1)[:: max(1, pixels.size // 4096)] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_bit_is_the_processors(family: str, size: tuple[int, int]) -> None:
    processor = AutoImageProcessor.from_pretrained(checkpoint(family))
    assert known(processor)
    picture = every_value(*size)
    for least, most in ((processor.size["shortest_edge"], processor.size["longest_edge"]), (64 * 64, 128 * 128)):
        bounds = {"shortest_edge": least, "longest_edge": most}
        wanted = processor(images=[picture], size=bounds, return_tensors="pt")
        pixels, grid = Patches(processor).cut(picture, least, most)
        assert list(grid) == wanted["image_grid_thw"][0].tolist()
        assert pixels.equal(wanted["pixel_values"]) and pixels.dtype == torch.float32


def test_every_value_of_every_channel_is_normalized_alike() -> None:
    processor = AutoImageProcessor.from_pretrained(checkpoint("qwen2_vl"))
    processor.image_mean, processor.image_std = (
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    )
    edge = processor.patch_size * processor.merge_size
    values = np.arange(edge * edge * 3, dtype=np.uint32).astype(np.uint8).reshape(edge, edge, 3)
    assert len({(c, v) for c in range(3) for v in values[..., c].flat}) == 3 * 256
    wanted = processor(images=[Image.fromarray(values)], size={"shortest_edge": 1, "longest_edge": 1 << 20})
    pixels, _ = Patches(processor).cut(Image.fromarray(values), 1, 1 << 20)
    assert (pixels.numpy() == wanted["pixel_values"]).all()


@pytest.mark.parametrize(
    ("name", "value"), [("do_resize", False), ("do_normalize", False), ("rescale_factor", 1 / 127.5), ("image_mean", 0)]
)
def test_a_processor_that_does_otherwise_is_left_to_itself(name: str, value: object) -> None:
    processor = AutoImageProcessor.from_pretrained(checkpoint("qwen3_vl"))
    setattr(processor, name, [value] if name == "image_mean" else value)
    assert not known(processor)
    assert not known(AutoImageProcessor.from_pretrained(checkpoint("internvl")))
