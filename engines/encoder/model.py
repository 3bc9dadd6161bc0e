"""The vision tower of a checkpoint, and nothing of its language model. It decodes no media and owns no thread.

    media worker            `stage`: the tower's dtype, in memory that a device can copy by itself
    device's threads        pixels to the device ▸ tower ▸ embeddings back, each once, to where they are read from

A batch of images of any sizes is one forward: their patches, or tiles, are concatenated; no padding, and no image
sees another. The result of an item is [tokens, width]:

    width   = hidden                            Qwen2-VL, Qwen2.5-VL, InternVL
    width   = hidden · (1 + deepstack levels)   Qwen3-VL:   | main | level 0 | level 1 | …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engines import dtypes, weights
from engines.devices import Beside
from engines.encoder.cutting import Prepared
from engines.encoder.towers import Tower, tower_of
from engines.encoder.varlen import implementation
from engines.encoder.worker import Encode
from engines.errors import SetupError
from engines.families import family_of, merge_size

# What of a tower's configuration decides how long an image takes and how large its embedding is.
_NUMBERS = (
    *("depth", "embed_dim", "hidden_size", "intermediate_size", "mlp_ratio", "out_hidden_size", "patch_size"),
    *("window_size", "fullatt_block_indexes", "deepstack_visual_indexes"),
)


class VisionModel:
    """A loaded tower on one device. `encode` is called by at most `depth` threads at a time."""

    def __init__(self, tower: Tower, config: Any, report: weights.LoadReport, device: str) -> None:
        self._tower = tower
        self._device = torch.device(device)
        self._beside = Beside(self._device)
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
        dtype_there = dtypes.chosen(dtype, config)
        try:
            attention = implementation(torch.device(device), dtype_there)
            tower = weights.on_meta(lambda: tower_of(family, config, attention))
            report = weights.load(tower.module, folder, part="vision", dtype=dtype_there, device=device)
        except weights.WeightsError as error:
            raise SetupError(f"--model {folder}: {error}") from None
        return cls(tower, config, report, device)

    @property
    def dtype_name(self) -> str:
        """As safetensors and vLLM write it: float32, bfloat16, float16."""
        return dtypes.name_of(self.dtype)

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

    @property
    def encodes(self) -> Sequence[Encode]:
        """One for each device: here there is one."""
        return (self.encode,)

    @property
    def depth(self) -> int:
        """Batches that a device is given at once: while one is copied, and its kernels are queued, another computes."""
        return 2 if self._device.type == "cuda" else 1

    def stage(self, item: Prepared) -> Prepared:
        """The item as `encode` takes it soonest. Called on media threads."""
        pixels = item.pixels.to(self.dtype)
        return replace(item, pixels=pixels.pin_memory() if self._device.type == "cuda" else pixels)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared], outputs: Sequence[torch.Tensor]) -> None:
        """One forward over all items; item i's embedding is written to outputs[i], [tokens, width] of `dtype`."""
        with self._beside():
            levels = self._tower(self._pixels(batch), batch)
            if self._device.type == "cuda":
                levels = [torch.cat(levels, dim=-1)]  # so that an embedding is one copy, into adjoining rows
            hidden = self.width // len(levels)
            start = 0
            for item, target in zip(batch, outputs, strict=True):
                for index, level in enumerate(levels):
                    columns = target[:, index * hidden : (index + 1) * hidden]
                    columns.copy_(level[start : start + item.tokens], non_blocking=True)
                start += item.tokens

    def _pixels(self, batch: Sequence[Prepared]) -> torch.Tensor:
        """Those of all items in one row on the device; each is copied there from where it is."""
        lengths = [len(item.pixels) for item in batch]
        row = torch.empty(sum(lengths), *batch[0].pixels.shape[1:], dtype=self.dtype, device=self._device)
        for item, part in zip(batch, torch.split(row, lengths), strict=True):
            part.copy_(item.pixels, non_blocking=True)
        return row


class Replicas:
    """One model on several devices, for a queue that gives each its batches. Loaded alike, they are told by the first.

    dtype, width, nbytes …: as of a `VisionModel`.
    """

    def __init__(self, models: Sequence[VisionModel]) -> None:
        first = models[0]
        self.dtype, self.dtype_name, self.width, self.depth = first.dtype, first.dtype_name, first.width, first.depth
        self.report = first.report
        self.numbers, self.nbytes, self.stage = first.numbers, first.nbytes, first.stage
        self.encodes: Sequence[Encode] = tuple(model.encode for model in models)

    @classmethod
    def load(cls, folder: Path, *, dtype: str, devices: Sequence[torch.device]) -> Replicas:
        """Raises SetupError with what to change."""
        return cls([VisionModel.load(folder, dtype=dtype, device=str(device)) for device in devices])
