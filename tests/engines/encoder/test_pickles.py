"""Pickles for SGLang, read by the rules of its own allow-list."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from engines.encoder.pickles import Global, embedding_data, modality
from tests.support.sglang import Modality, read

FIELDS: dict[str, Any] = {
    "req_id": "r_local_part_0",
    "num_parts": 2,
    "grid_dim": torch.tensor([[1, 4, 6], [1, 2, 2]]),
    "modality": modality("image"),
    "embedding": None,
    "dtype": torch.bfloat16,
    "shape": [7, 256],
    "again": "r_local_part_0",
    "error_msg": "ünreadable",
}


@pytest.mark.parametrize(
    ("new", "module"),
    [
        (False, "sglang.srt.disaggregation.encode_receiver"),
        (True, "sglang.srt.disaggregation.encoder.receiver"),
    ],
)
def test_each_version_finds_its_own_class_with_every_attribute(new: bool, module: str) -> None:
    found = read(embedding_data(FIELDS, new))
    assert found.module == module
    assert found.grid_dim.equal(FIELDS["grid_dim"]) and found.grid_dim.dtype is torch.long
    assert vars(found) == FIELDS | {"modality": Modality.IMAGE, "grid_dim": found.grid_dim}


def test_values_do_not_write_over_what_others_still_need() -> None:
    """Each value has a memo of its own, and all write into one."""
    shared = ["x" * 9]
    fields = {f"f{n}": [shared, shared, {"k": shared}] for n in range(5)}
    found = vars(read(embedding_data(fields, True)))
    assert found == fields and found["f3"][0] is found["f3"][1]


def test_a_modality_that_sglang_does_not_have_is_refused() -> None:
    assert modality("VIDEO") == Global("sglang.srt.managers.schedule_batch", "Modality", 2)
    with pytest.raises(KeyError):
        modality("smell")


def test_the_reader_of_these_tests_admits_nothing_else() -> None:
    with pytest.raises(pickle.UnpicklingError, match="not admitted"):
        read(embedding_data({"evil": torch.nn.ReLU}, True))
