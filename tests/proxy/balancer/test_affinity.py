"""The soonest, and of those about as soon the key's own: against a reference that looks at each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.affinity import TIE, Affinity
from proxy.balancer.foresight import DOUBT
from proxy.balancer.hashing import hash64, rank
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import Role
from tests.support.balancing import demands, pool

URLS = "abcdefghijklmnopqrstuvwxyz"
KEYS = [f"key {number}" for number in range(1000)]


def naive(candidates: Pool, demand: Demand, ledger: Ledger, rates: Rates) -> str:
    def time(url: str) -> float:
        rate = rates.seconds(url)
        ahead = max(demand.ready, ledger.load(url) * rate)
        if demand.at_once and url in demand.held:
            ahead = DOUBT * (ahead + demand.work * rate)
        return ahead + demand.at(url) * rate + demand.transfer.get(url, 0.0)

    first = min(candidates, key=lambda url: (time(url), url))
    latest = time(first) + TIE * demand.at(first) * rates.seconds(first)
    tied = [url for url in candidates if time(url) <= latest]
    if demand.key:
        return max(tied, key=lambda url: rank(hash64(url), hash64(demand.key)))
    return min(tied, key=lambda url: (ledger.standing(url).used, url))


@given(
    demands(URLS),
    st.lists(st.tuples(st.sampled_from(URLS), st.integers(1, 200), st.booleans())),
    st.sampled_from([1, 2, 3, 6, len(URLS)]),
)
def test_it_chooses_what_looking_at_each_would(demand: Demand, taken: list[tuple[str, int, bool]], count: int) -> None:
    everybody, ledger, rates = pool(URLS), Ledger({}), Rates(0.5)
    for url, tokens, returned in taken:
        lease = ledger.lease(everybody.by_url[url], Role.ENCODE, tokens)
        rates.observe(url, 1, 0, 2.0 ** (ord(url) % 3 - 1))  # powers of two: the same sums in any order
        if returned:
            lease.close()
    some = pool(URLS[:count])
    chosen = Affinity(Means(rates=rates)).choose(some, demand, ledger)
    assert chosen == naive(some, demand, ledger, rates)


def homes(candidates: Pool) -> dict[str, str]:
    policy, ledger = Affinity(Means()), Ledger({})
    return {key: policy.choose(candidates, Demand(100, key), ledger) for key in KEYS}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_of_idle_ones_who_leaves_or_joins_moves_only_its_own_share(count: int) -> None:
    urls = [f"http://h:{port}" for port in range(count)]
    all_, fewer = homes(pool(urls)), homes(pool(urls[1:]))
    moved = {key for key in KEYS if all_[key] != fewer[key]}
    assert moved == {key for key in KEYS if all_[key] == urls[0]}
    assert abs(len(moved) - len(KEYS) / count) < 5 * np.sqrt(len(KEYS) / count)


def test_an_item_goes_to_its_holder_until_that_is_too_busy() -> None:
    two, ledger = pool("ab"), Ledger({})
    policy, demand = Affinity(Means(rates=Rates(1e-3))), Demand(1000, "cat", {"b": 30})
    ledger.lease(two.by_url["b"], Role.ENCODE, 900)
    assert policy.choose(two, demand, ledger) == "b"
    ledger.lease(two.by_url["b"], Role.ENCODE, 900)
    assert policy.choose(two, demand, ledger) == "a"


def test_what_is_not_ready_yet_makes_queues_equal_and_distance_decides() -> None:
    two, ledger = pool("ab"), Ledger({})
    policy = Affinity(Means(rates=Rates(1e-3)))
    ledger.lease(two.by_url["a"], Role.PREFILL, 500)
    assert policy.choose(two, Demand(100), ledger) == "b"
    assert policy.choose(two, Demand(100, ready=0.6, transfer={"b": 0.2}), ledger) == "a"
