"""What every policy must do, whatever its idea."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import POLICIES
from proxy.balancer.policy import Policy

keys = st.sampled_from("abcdef")


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.tuples(st.sets(keys, min_size=1), keys, st.integers(0, 9))))
def test_the_choice_is_a_candidate(name: str, steps: list[tuple[set[str], str, int]]) -> None:
    policy: Policy = POLICIES[name]()
    for candidates, key, load in steps:
        assert policy.choose(candidates) in candidates
        policy.changed(key, load)
        if load == 0:
            policy.forget(key)


@pytest.mark.parametrize("name", POLICIES)
def test_equals_take_turns(name: str) -> None:
    policy = POLICIES[name]()
    chosen = [policy.choose("abc") for _ in range(9)]
    assert sorted(chosen[:3]) == sorted(chosen[3:6]) == ["a", "b", "c"]
    assert chosen[:3] == chosen[3:6] == chosen[6:]
