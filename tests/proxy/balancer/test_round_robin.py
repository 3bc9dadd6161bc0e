"""Turns, also while the candidates change."""

from __future__ import annotations

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.round_robin import RoundRobin
from proxy.core import Role
from tests.support.balancing import pool


class Turns:
    """A policy and a ledger, in which everything stays that was taken."""

    def __init__(self) -> None:
        self.policy = RoundRobin(Means())
        self.ledger = Ledger({})

    def choose(self, candidates: str) -> str:
        several = pool(candidates)
        url = self.policy.choose(several, Demand(1), self.ledger)
        self.ledger.lease(several.by_url[url], Role.DECODE, 1 + 1000 * (url == "a"))
        return url


def test_a_newcomer_is_next_and_a_leaver_is_skipped() -> None:
    turns = Turns()
    assert [turns.choose("ab") for _ in range(3)] == ["a", "b", "a"]
    assert turns.choose("abc") == "c"
    assert turns.choose("ac") == "a"
    assert turns.choose("abc") == "b"


def test_load_does_not_matter() -> None:
    turns = Turns()
    assert [turns.choose("ba") for _ in range(5)] == ["a", "b", "a", "b", "a"]


def test_whoever_weighs_more_has_more_turns() -> None:
    policy, ledger = RoundRobin(Means()), Ledger({})
    two = pool("abc", a=2.0)
    assert "".join(policy.choose(two, Demand(1), ledger) for _ in range(8)) == "aabcaabc"
