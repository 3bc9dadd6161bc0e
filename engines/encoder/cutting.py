"""How each family cuts an image into what its tower sees: by the checkpoint's own processor. It decodes no bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from engines.encoder.frames import Clip
from engines.encoder.patches import Patches, known
from engines.errors import BadRequest
from engines.families import family_of, merge_size


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One image or video, ready for the vision tower.

    pixels: [patches, channels · temporal patch · patch²], or [tiles, channels, height, width], float32.
    grid: (t, h, w) in patches; of tiles (tiles, h, w), each.   tokens: embeddings it becomes, patches / merge².
    clip: when the steps of a video are; None: it is an image.
    """

    pixels: torch.Tensor
    grid: tuple[int, int, int]
    tokens: int
    clip: Clip | None = None

    @property
    def patches(self) -> int:
        return math.prod(self.grid)


class Cutter(Protocol):
    """Thread-safe: processors are only read. `size`: the pixel bounds of a request, {"shortest_edge", "longest_edge"},
    in pixels²; absent: the checkpoint's."""

    def numbers(self) -> dict[str, Any]:
        """How an image is cut, for whoever predicts its tokens: as the processor's file says it. JSON."""
        ...

    def patches(self, pixels: int, size: Mapping[str, int]) -> int:
        """About as many patches as an image of so many pixels will make, or at the most."""
        ...

    def cut(self, picture: Image.Image, size: Mapping[str, int]) -> Prepared: ...


def cutter_of(folder: Path) -> Cutter:
    """Raises SetupError for a family that is not known, OSError and ValueError for a folder without a processor."""
    config = AutoConfig.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    return TileCutter(processor, config) if family_of(folder, config).tiled else GridCutter(processor)


class GridCutter:
    """Each image in patches of its own size, within bounds of pixels (Qwen-VL)."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._patch: int = processor.patch_size
        self._merge: int = processor.merge_size
        self._patches = Patches(processor) if known(processor) else None

    def numbers(self) -> dict[str, Any]:
        return {
            "patch_size": self._patch,
            "merge_size": self._merge,
            "temporal_patch_size": self._processor.temporal_patch_size,
            "size": self._bounds({}),
        }

    def patches(self, pixels: int, size: Mapping[str, int]) -> int:
        """The processor rounds each side to whole merged patches."""
        bounds = self._bounds(size)
        return max(min(pixels, bounds["longest_edge"]), bounds["shortest_edge"]) // self._patch**2

    def cut(self, picture: Image.Image, size: Mapping[str, int]) -> Prepared:
        bounds = self._bounds(size)
        if self._patches is not None:
            pixels, grid = self._patches.cut(picture, bounds["shortest_edge"], bounds["longest_edge"])
            return Prepared(pixels, grid, math.prod(grid) // self._merge**2)
        options = {"size": bounds} if size else {}
        out = self._processor(images=[picture], return_tensors="pt", **options)
        t, h, w = (int(n) for n in out["image_grid_thw"][0])
        return Prepared(out["pixel_values"], (t, h, w), t * h * w // self._merge**2)

    def _bounds(self, size: Mapping[str, int]) -> dict[str, int]:
        return {**{edge: self._processor.size[edge] for edge in ("shortest_edge", "longest_edge")}, **size}


class TileCutter:
    """Each image in square tiles of one size, as many as its shape asks for, and one of the whole (InternVL)."""

    def __init__(self, processor: Any, config: Any) -> None:
        self._processor = processor
        self._merge = merge_size(config)
        tower = config.vision_config
        self._rows: int = tower.image_size[0] // tower.patch_size[0]
        self._columns: int = tower.image_size[1] // tower.patch_size[1]
        self._most: int = processor.max_patches + (processor.max_patches > 1)

    def numbers(self) -> dict[str, Any]:
        size = self._processor.size
        return {
            "tile": [size["height"], size["width"]],
            "tile_tokens": self._rows * self._columns // self._merge**2,
            "max_tiles": self._processor.max_patches,
        }

    def patches(self, pixels: int, size: Mapping[str, int]) -> int:
        return self._most * self._rows * self._columns

    def cut(self, picture: Image.Image, size: Mapping[str, int]) -> Prepared:
        """Raises BadRequest: the number of tiles follows from an image's shape, not from bounds of pixels."""
        if size:
            raise BadRequest("this model's images have no bounds of pixels", code="invalid_image")
        out = self._processor(images=[picture], crop_to_patches=True, return_tensors="pt")
        tiles = len(out["pixel_values"])
        grid = (tiles, self._rows, self._columns)
        return Prepared(out["pixel_values"], grid, math.prod(grid) // self._merge**2)
