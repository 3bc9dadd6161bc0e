"""Decode goes where tokens come fastest, and where there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import POLICIES
from proxy.balancer.affinity import Affinity
from proxy.balancer.ledger import Ledger
from proxy.balancer.pace import OUTPUT, SEQUENCE, STEP, TOKEN, Pace
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, Role
from tests.support.balancing import demands, pool

URLS = "abcd"


def naive(candidates: Pool, demand: Demand, ledger: Ledger) -> str:
    def pace(url: str) -> float:
        batch, kept = ledger.leases(url=url) + 1, ledger.load(url) + demand.work
        return (STEP + SEQUENCE * batch + TOKEN * kept) + demand.transfer.get(url, 0.0) / OUTPUT

    def full(url: str) -> bool:
        room = candidates.by_url[url].facts.get("kv_tokens")
        return room is not None and ledger.load(url) + (demand.room or demand.work) > room

    return min(candidates, key=lambda url: (full(url), pace(url), ledger.standing(url).used, url))


@given(
    demands(URLS),
    st.lists(st.tuples(st.sampled_from(URLS), st.integers(1, 200), st.booleans())),
    st.dictionaries(st.sampled_from(URLS), st.integers(1, 500)),
)
def test_it_chooses_what_looking_at_each_would(
    demand: Demand, taken: list[tuple[str, int, bool]], room: dict[str, int]
) -> None:
    candidates, ledger = pool(URLS), Ledger({})
    for url, tokens in room.items():
        candidates.by_url[url].facts = {"kv_tokens": tokens}
    for url, tokens, returned in taken:
        lease = ledger.lease(candidates.by_url[url], Role.DECODE, tokens)
        if returned:
            lease.close()
    policy = Pace(Means(Role.DECODE, Rates(1.0)))
    assert policy.choose(candidates, demand, ledger) == naive(candidates, demand, ledger)


def test_a_slow_instance_gets_less() -> None:
    two, ledger, rates = pool("ab"), Ledger({}), Rates(1.0)
    for url, seconds in (("a", 3.0), ("b", 1.0)):
        for _ in range(9):
            rates.observe(url, 1, 0, seconds)
    policy = Pace(Means(Role.DECODE, rates))
    assert [policy.choose(two, Demand(100), ledger) for _ in range(2)] == ["b", "b"]


def test_instances_that_seem_a_little_faster_do_not_get_all() -> None:
    two, ledger, rates = pool("ab"), Ledger({}), Rates(1.0)
    for url, seconds in (("a", 1.3), ("b", 1.0)):
        for _ in range(9):
            rates.observe(url, 1, 0, seconds)
    policy = Pace(Means(Role.DECODE, rates))
    chosen = []
    for _ in range(6):
        chosen.append(policy.choose(two, Demand(100), ledger))
        ledger.lease(two.by_url[chosen[-1]], Role.DECODE, 100)
    assert sorted(chosen) == ["a"] * 3 + ["b"] * 3


def test_affinity_means_pace_for_decode_alone() -> None:
    assert isinstance(POLICIES["affinity"](Means(Role.DECODE)), Pace)
    assert all(isinstance(POLICIES["affinity"](Means(role)), Affinity) for role in (Role.ENCODE, Role.PREFILL, BOTH))
    assert Pace(Means()).choose(pool("z"), Demand(5), Ledger({})) == "z"
