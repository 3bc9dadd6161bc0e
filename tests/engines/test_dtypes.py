from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.dtypes import chosen, name_of, named


def config(own: Any, text: Any = None) -> Any:
    return SimpleNamespace(dtype=own, get_text_config=lambda: SimpleNamespace(dtype=text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_a_name_names_its_dtype(dtype: torch.dtype) -> None:
    assert named(name_of(dtype)) is dtype


@pytest.mark.parametrize(
    ("name", "own", "text", "found"),
    [
        ("float16", torch.bfloat16, None, torch.float16),
        ("auto", torch.bfloat16, torch.float16, torch.bfloat16),
        ("auto", "bfloat16", None, torch.bfloat16),
        ("auto", None, torch.float16, torch.float16),
        ("auto", None, None, torch.float32),
    ],
)
def test_a_dtype_is_the_one_asked_for_or_the_checkpoints(name: str, own: Any, text: Any, found: torch.dtype) -> None:
    assert chosen(name, config(own, text)) is found
