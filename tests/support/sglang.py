"""The receiving end of SGLang's embeddings: what its language servers would admit of a pickle, and nothing else."""

from __future__ import annotations

import io
import pickle
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils


class Modality(Enum):
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


class EmbeddingData(SimpleNamespace):
    """`module`: the one that the pickle names."""

    module: str


ADMITTED: dict[tuple[str, str], Any] = {
    ("sglang.srt.managers.schedule_batch", "Modality"): Modality,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(io.BytesIO(data), weights_only=True),
    ("torch", "float32"): torch.float32,
    ("torch", "bfloat16"): torch.bfloat16,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): lambda text, coding: text.encode(coding),
}
"""A part of the allow-list of 0.5.23, which 0.5.10 does without."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "EmbeddingData" and module.startswith("sglang.srt.disaggregation."):
            return type("EmbeddingData", (EmbeddingData,), {"module": module})
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return ADMITTED[module, name]


def read(data: bytes) -> EmbeddingData:
    found = _Reader(io.BytesIO(data)).load()
    assert isinstance(found, EmbeddingData)
    return found
