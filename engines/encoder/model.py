"""The vision tower of a checkpoint, and nothing of its language model. It decodes no media and owns no thread.

A batch of images of any sizes is one forward: their patches, or tiles, are concatenated; no padding, and no image
sees another. The result of an item is [tokens, width]:

    width   = hidden                            Qwen2-VL, Qwen2.5-VL, InternVL
    width   = hidden · (1 + deepstack levels)   Qwen3-VL:   | main | level 0 | level 1 | …
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engines import weights
from engines.encoder.cutting import Prepared
from engines.encoder.towers import Tower, tower_of
from engines.errors import SetupError
from engines.families import family_of, merge_size

# What of a tower's configuration decides how long an image takes and how large its embedding is.
_NUMBERS = (
    *("depth", "embed_dim", "hidden_size", "intermediate_size", "mlp_ratio", "out_hidden_size", "patch_size"),
    *("window_size", "fullatt_block_indexes", "deepstack_visual_indexes"),
)


class VisionModel:
    """A loaded tower. `encode` is called by one thread at a time."""

    def __init__(self, tower: Tower, config: Any, report: weights.LoadReport, device: str) -> None:
        self._tower = tower
        self._device = torch.device(device)
        self._config = config
        self.report = report
        self.dtype: torch.dtype = next(tower.module.parameters()).dtype
        self.merge_size = merge_size(config)
        self.width = tower.width

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "auto", device: str = "cpu") -> VisionModel:
        """Read the tower's tensors from a checkpoint folder. Raises SetupError with what to change."""
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise SetupError(f"--model {folder}: {error}") from None
        family = family_of(folder, config)
        chosen = _dtype(dtype, config)
        try:
            tower = weights.on_meta(lambda: tower_of(family, config))
            report = weights.load(tower.module, folder, part="vision", dtype=chosen, device=device)
        except weights.WeightsError as error:
            raise SetupError(f"--model {folder}: {error}") from None
        return cls(tower, config, report, device)

    @property
    def dtype_name(self) -> str:
        """As safetensors and vLLM write it: float32, bfloat16, float16."""
        return str(self.dtype).removeprefix("torch.")

    def numbers(self) -> dict[str, Any]:
        """For whoever predicts the cost of an image: its family, of its configuration what counts, and the bytes of a
        number of its embeddings. JSON."""
        told = {name: getattr(self._config.vision_config, name, None) for name in _NUMBERS}
        return {
            "model_type": self._config.vision_config.model_type,
            "vision_config": {name: value for name, value in told.items() if value is not None},
            "itemsize": self.dtype.itemsize,
        }

    def nbytes(self, tokens: int) -> int:
        return tokens * self.width * self.dtype.itemsize

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared], outputs: Sequence[torch.Tensor]) -> None:
        """One forward over all items; item i's embedding is written to outputs[i], [tokens, width] of `dtype`."""
        pixels = torch.cat([item.pixels for item in batch]).to(self._device, self.dtype)
        levels = self._tower(pixels, batch)
        hidden = self.width // len(levels)
        start = 0
        for item, target in zip(batch, outputs, strict=True):
            for index, level in enumerate(levels):
                target[:, index * hidden : (index + 1) * hidden].copy_(level[start : start + item.tokens])
            start += item.tokens


def _dtype(name: str, config: Any) -> torch.dtype:
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored
