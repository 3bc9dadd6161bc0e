"""What every policy must do, whatever its idea."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.balancer import POLICIES
from proxy.balancer.ledger import Lease
from proxy.balancer.policy import Demand
from proxy.core import BOTH, ROLES, Role
from tests.support.balancing import balancer, demands, pool

URLS = "abcdef"
DICED = {"random", "two_choices"}

steps = st.lists(st.tuples(st.sets(st.sampled_from(URLS), min_size=1), demands(URLS), st.integers(0, 9)))


def chosen(policy: str, role: Role, taken: list[tuple[set[str], Demand, int]], fixed: dict[frozenset[str], object]):
    """The choices of one balancer, whose leases are given back in between; each is checked to be a candidate."""
    deciding = balancer(policy)
    leases: list[Lease] = []
    found = []
    for candidates, demand, returned in taken:
        some = fixed.setdefault(frozenset(candidates), pool(candidates, role))
        leases.append(deciding.take(role, some, demand))
        found.append(leases[-1].instance.url)
        assert found[-1] in candidates
        assert leases[-1].instance is some.by_url[found[-1]]
        if returned < len(leases):
            leases.pop(returned).close()
        deciding.ledger.check()
    for lease in leases:
        lease.close()
    assert deciding.ledger.leases() == 0 and not deciding.holders._flights
    return found


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.label)
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(steps)
def test_the_choice_is_a_candidate_and_the_same_for_the_same_inputs(
    policy: str, role: Role, taken: list[tuple[set[str], Demand, int]]
) -> None:
    once = chosen(policy, role, taken, {})
    again = chosen(policy, role, taken, {})
    assert once == again


@pytest.mark.parametrize("policy", POLICIES)
def test_a_changed_fleet_is_a_new_pool_and_nothing_of_the_old_one_counts(policy: str) -> None:
    deciding, dice = balancer(policy), Random(policy)
    for _ in range(200):
        candidates = dice.sample(URLS, dice.randint(1, len(URLS)))
        lease = deciding.take(BOTH, pool(candidates), Demand(dice.randint(1, 50), dice.choice("xyz")))
        assert lease.instance.url in candidates
        if dice.random() < 0.5:
            lease.close()
        if dice.random() < 0.1:
            deciding.forget(lease.instance)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE], ids=lambda role: role.label)
@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - DICED))
def test_equals_take_turns(policy: str, role: Role) -> None:
    deciding, three = balancer(policy), pool("bca", role)
    order = []
    for _ in range(9):
        with deciding.take(role, three, Demand(5)) as lease:
            order.append(lease.instance.url)
    assert order == [*"abcabcabc"]


@pytest.mark.parametrize("role", [Role.DECODE, BOTH], ids=lambda role: role.label)
@pytest.mark.parametrize("policy", POLICIES)
def test_each_gets_work_in_proportion_to_its_weight(policy: str, role: Role) -> None:
    deciding, weights = balancer(policy), {"a": 1.0, "b": 4.0, "c": 0.5, "d": 2.5}
    several = pool("abcd", role, **weights)
    leases = [deciding.take(role, several, Demand(100, f"k{number}")) for number in range(1600)]
    found = [lease.instance.url for lease in leases]
    for url, weight in weights.items():
        wanted = 1600 * weight / 8
        assert 0.6 * wanted <= found.count(url) <= 1.4 * wanted, (url, found.count(url))
    for lease in leases:
        lease.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_weights_are_none(policy: str) -> None:
    demands = [Demand(work, key) for work, key in zip(range(1, 60), "xyz" * 20, strict=False)]
    found = []
    for weight in (1.0, 7.0):
        deciding, several = balancer(policy), pool("abc", **dict.fromkeys("abc", weight))
        found.append([deciding.take(BOTH, several, demand).instance.url for demand in demands])
    assert found[0] == found[1]
