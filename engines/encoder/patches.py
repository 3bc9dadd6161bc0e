"""What transformers' Pillow processor of the Qwen-VL families makes of an image, bit by bit, in a third of its time.

That one goes over an image again and again: to an array and back to Pillow, to 64-bit floats and back. Here an image is
resized once, cut while its pixels are bytes, and becomes floats band by band. `python -m bench.engines` measures both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

STEPS = ("do_resize", "do_rescale", "do_normalize")


def known(processor: Any) -> bool:
    """Whether it is that processor, and does all that it does by default."""
    return (
        type(processor) is Qwen2VLImageProcessorPil
        and all(getattr(processor, step) for step in STEPS)
        and processor.rescale_factor == 1 / 255
        and len(processor.image_mean) == len(processor.image_std) == 3
    )


class Patches:
    """One processor's. Thread-safe."""

    def __init__(self, processor: Any) -> None:
        self._patch: int = processor.patch_size
        self._merge: int = processor.merge_size
        self._repeats: int = processor.temporal_patch_size
        self._resample = processor.resample
        self._mean, self._std = (
            np.array(numbers, np.float32)[None, :, None] for numbers in (processor.image_mean, processor.image_std)
        )

    def cut(self, picture: Image.Image, least: int, most: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """An RGB image, resized to between `least` and `most` pixels: [patches, 3 · temporal patch · patch²], float32,
        in the order of merged patches, and its grid in patches."""
        factor = self._patch * self._merge
        height, width = smart_resize(picture.height, picture.width, factor, min_pixels=least, max_pixels=most)
        resized = np.asarray(picture.resize((width, height), self._resample))
        rows, columns, area = height // self._patch, width // self._patch, self._patch**2
        out = np.empty((rows * columns, 3, self._repeats, area), np.float32)
        band = columns * self._merge  # as many patches at a time as stay in a processor's cache
        values = np.empty((band, 3, area), np.float32)
        for number, target in enumerate(out.reshape(-1, band, *out.shape[1:])):
            cut = self._cut(resized[number * factor : (number + 1) * factor])
            np.divide(cut, np.float32(255), out=values)  # as a float32 the same as times 1/255 in 64 bits
            np.subtract(values, self._mean, out=values)
            np.divide(values, self._std, out=values)
            target[:] = values[:, :, None]
        return torch.from_numpy(out).flatten(1), (1, rows, columns)

    def _cut(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """[height, width, 3] → [patches, 3, patch²]"""
        height, width, channels = image.shape
        patch, merge = self._patch, self._merge
        parts = image.reshape(height // patch // merge, merge, patch, width // patch // merge, merge, patch, channels)
        return np.ascontiguousarray(parts.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, channels, patch * patch)
