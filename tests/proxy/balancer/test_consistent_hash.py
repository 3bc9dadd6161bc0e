"""Keys stay where they are while instances come and go, and nobody is loaded much more than the average."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.consistent_hash import BOUND, ConsistentHash
from proxy.balancer.hashing import hash64, hashes
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool
from proxy.core import Role
from tests.support.balancing import pool

KEYS = [f"key {number}" for number in range(2000)]


def homes(candidates: Pool) -> dict[str, str]:
    """Where each key goes while nothing is loaded."""
    policy, ledger = ConsistentHash(Means()), Ledger({})
    return {key: policy.choose(candidates, Demand(1, key), ledger) for key in KEYS}


def test_who_leaves_or_joins_moves_only_its_own_share() -> None:
    urls = [f"http://h:{port}" for port in range(8)]
    all_, fewer = homes(pool(urls)), homes(pool(urls[1:]))
    moved = {key for key in KEYS if all_[key] != fewer[key]}
    assert moved == {key for key in KEYS if all_[key] == urls[0]}
    assert len(KEYS) / 16 < len(moved) < len(KEYS) / 4, "about an eighth"
    assert {fewer[key] for key in moved} > set(urls[2:5]), "which goes to many"


@given(st.lists(st.integers(0, 100), min_size=2, max_size=6), st.integers(1, 300), st.text(min_size=1, max_size=3))
def test_it_is_the_first_on_the_ring_within_the_bound(loads: list[int], work: int, key: str) -> None:
    urls = [f"http://h:{port}" for port in range(len(loads))]
    candidates, ledger = pool(urls), Ledger({})
    for url, load in zip(urls, loads, strict=True):
        if load:
            ledger.lease(candidates.by_url[url], Role.ENCODE, load)
    points = sorted((int(point), url) for url in urls for point in hashes(url, 64))
    ring = [url for point, url in points if point >= hash64(key)] + [url for _, url in points]
    bound = BOUND * (sum(loads) + work) / len(loads)
    wanted = next(url for url in ring if ledger.load(url) <= bound)
    assert ConsistentHash(Means()).choose(candidates, Demand(work, key), ledger) == wanted


def test_without_a_key_the_least_loaded_has_it() -> None:
    three, ledger, policy = pool("abc"), Ledger({}), ConsistentHash(Means())
    chosen = []
    for _ in range(4):
        chosen.append(url := policy.choose(three, Demand(5), ledger))
        ledger.lease(three.by_url[url], Role.ENCODE, 5)
    assert chosen == ["a", "b", "c", "a"]
    assert policy.choose(pool("z"), Demand(5), ledger) == "z"
