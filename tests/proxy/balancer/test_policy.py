"""What every policy must do, whatever its idea."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import POLICIES
from proxy.balancer.board import Standing
from proxy.balancer.policy import Demand, Means, Policy
from tests.support.balancing import pool

keys = st.sampled_from("abcdef")


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.tuples(st.sets(keys, min_size=1), keys, st.integers(0, 9))))
def test_the_choice_is_a_candidate(name: str, steps: list[tuple[set[str], str, int]]) -> None:
    policy: Policy = POLICIES[name](Means())
    standings: defaultdict[str, Standing] = defaultdict(lambda: Standing(0, 0))
    for turn, (candidates, key, load) in enumerate(steps):
        assert policy.choose(pool(candidates), Demand(1), standings.__getitem__) in candidates
        standings[key] = Standing(load, turn)
        policy.changed(key, standings[key])
        if load == 0:
            policy.forget(key)


@pytest.mark.parametrize("name", POLICIES)
def test_equals_take_turns(name: str) -> None:
    policy: Policy = POLICIES[name](Means())
    standings = {key: Standing(0, 0) for key in "abc"}
    chosen = []
    for turn in range(1, 10):
        chosen.append(key := policy.choose(pool("abc"), Demand(1), standings.__getitem__))
        standings[key] = Standing(0, turn)
        policy.changed(key, standings[key])
    assert sorted(chosen[:3]) == sorted(chosen[3:6]) == ["a", "b", "c"]
    assert chosen[:3] == chosen[3:6] == chosen[6:]
