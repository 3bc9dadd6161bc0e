"""Number formats by the names that safetensors, vLLM and our own wire have for them: float32, bfloat16, float16."""

from __future__ import annotations

from typing import Any

import torch


def name_of(dtype: torch.dtype) -> str:
    """
    >>> name_of(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def named(name: str) -> torch.dtype:
    """Raises AttributeError: torch has none of that name."""
    found: torch.dtype = getattr(torch, name)
    return found


def chosen(name: str, config: Any) -> torch.dtype:
    """What --dtype means for a checkpoint of this configuration; `auto` takes its own."""
    if name != "auto":
        return named(name)
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return named(stored) if isinstance(stored, str) else stored
