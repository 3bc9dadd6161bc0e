"""The vision parts of the families as modules, and how each is asked. They load and keep no weights of their own.

A tower has the names of its tensors as `engines.weights` gives them, takes prepared items in a batch, and returns for
each level [tokens of all items, hidden]: the embeddings first, then deepstack's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

from engines.encoder import varlen
from engines.encoder.cutting import Prepared
from engines.families import Family


class Tower(Protocol):
    """`width`: numbers of one token's embedding, all levels together."""

    module: nn.Module
    width: int

    def __call__(self, pixels: torch.Tensor, batch: Sequence[Prepared]) -> list[torch.Tensor]: ...


class GridTower:
    """Patches of images of any sizes in one row; `grid_thw` tells where one ends and the next begins (Qwen-VL)."""

    def __init__(self, make: Any, config: Any, attention: str) -> None:
        vision = config.vision_config
        self.module: nn.Module = make._from_config(vision, attn_implementation="sdpa")
        # Set behind its back: of whatever calls itself flash, transformers looks for a package, or on the network.
        self.module.config._attn_implementation = attention
        self._at_once = attention != "sdpa"
        hidden = getattr(vision, "out_hidden_size", None) or vision.hidden_size
        self.width: int = hidden * (1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()))

    def __call__(self, pixels: torch.Tensor, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        grids = [item.grid for item in batch]
        told = varlen.told(self.module, grids, pixels.device) if self._at_once else {}
        out = self.module(pixels, grid_thw=torch.tensor(grids, device=pixels.device), return_dict=True, **told)
        return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


class TileTower:
    """Square tiles of one size, each by itself: transformers' whole model but for its text half (InternVL)."""

    def __init__(self, make: Any, config: Any) -> None:
        self.module: nn.Module = make._from_config(config, attn_implementation="sdpa")
        del self.module.language_model
        self.width: int = config.text_config.hidden_size

    def __call__(self, pixels: torch.Tensor, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        tiles: torch.Tensor = self.module.get_image_features(pixels, return_dict=True).pooler_output  # type: ignore[operator]
        return [tiles.flatten(0, 1)]


def tower_of(family: Family, config: Any, attention: str = "sdpa") -> Tower:
    """Within `weights.on_meta`, without memory for its weights. `attention`: see `varlen.implementation`."""
    module, _, name = family.vision.partition(":")
    make = getattr(import_module(f"transformers.models.{module}"), name)
    return TileTower(make, config) if family.tiled else GridTower(make, config, attention)
