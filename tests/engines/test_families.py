"""Families: every one has a checkpoint to prove it, and the others are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from engines import tiny
from engines.errors import SetupError
from engines.families import FAMILIES, family_of, merge_size
from tests.support.checkpoints import checkpoint


def test_every_family_can_be_made_small() -> None:
    assert FAMILIES.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_of_its_family(name: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert family_of(checkpoint(name), config) is FAMILIES[name]
    assert merge_size(config) == 2


def test_another_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(SetupError, match=r"--model /m: 'llava' is not served; known: qwen2_vl, .*internvl"):
        family_of("/m", SimpleNamespace(model_type="llava"))
