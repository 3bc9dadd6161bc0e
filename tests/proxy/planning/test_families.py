"""Which engines fit together, and which can never serve."""

from __future__ import annotations

import pytest

from proxy.core import Instance, Role
from proxy.planning.families import Families

RULES = Families(feeds={"native": {"native", "vllm"}})


def listed(*engines: str) -> list[Instance]:
    """From "vllm-prefill", a family and a role's label each."""
    pairs = [engine.split("-") for engine in engines]
    return [Instance(f"http://h:{n}", Role.named(label), family) for n, (family, label) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("engines", "strays"),
    [
        (["native-encode", "native-both"], []),
        (["native-encode", "vllm-both"], []),
        (["vllm-encode", "native-both"], ["vllm-encode"]),
        (["vllm-encode", "vllm-prefill", "vllm-decode", "native-both"], []),
        (["native-prefill", "vllm-decode"], ["native-prefill", "vllm-decode"]),
        (["native-prefill", "native-decode", "vllm-decode"], ["vllm-decode"]),
        (["native-prefill"], []),
        (["vllm-encode"], []),
        (["vllm-encode", "native-both", "auto-both"], []),
        (["sglang-both", "vllm-both", "ascend-prefill"], ["ascend-prefill"]),
    ],
)
def test_an_engine_strays_that_no_path_of_its_family_can_hold(engines: list[str], strays: list[str]) -> None:
    fleet = listed(*engines)
    found = {f"{i.dialect}-{i.role.label}" for i in fleet if RULES.stray(i, fleet)}
    assert found == set(strays)


def test_the_reason_names_families_and_a_way_out() -> None:
    fleet = listed("vllm-encode", "native-both")
    reason = RULES.stray(fleet[0], fleet)
    assert reason is not None
    assert "it speaks vllm" in reason and "among native engines" in reason and "native+http://" in reason


def test_an_encoder_fits_whom_it_feeds_and_a_language_engine_its_own_family() -> None:
    encoder, both = listed("native-encode", "native-both")
    assert [RULES.fit(encoder, family) for family in ("native", "vllm", "sglang")] == [True, True, False]
    assert [RULES.fit(both, family) for family in ("native", "vllm")] == [True, False]
    assert [RULES.fit(encoder, family, {"native", "vllm"}) for family in ("native", "vllm")] == [True, False]
