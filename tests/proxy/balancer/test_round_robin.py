"""Turns, also while the candidates change."""

from proxy.balancer.board import Standing
from proxy.balancer.policy import Demand, Means
from proxy.balancer.round_robin import RoundRobin
from tests.support.balancing import pool


class Turns:
    """A policy, and the uses that a ledger would keep."""

    def __init__(self) -> None:
        self.policy = RoundRobin(Means())
        self.used: dict[str, int] = {}

    def choose(self, candidates: str) -> str:
        key = self.policy.choose(pool(candidates), Demand(1), self.standing)
        self.used[key] = 1 + max(self.used.values(), default=0)
        self.policy.changed(key, self.standing(key))
        return key

    def standing(self, key: str) -> Standing:
        return Standing(1000 if key == "a" else 0, self.used.get(key, 0))


def test_a_newcomer_is_next_and_a_leaver_is_skipped() -> None:
    turns = Turns()
    assert [turns.choose("ab") for _ in range(3)] == ["a", "b", "a"]
    assert turns.choose("abc") == "c"
    assert turns.choose("ac") == "a"
    turns.policy.forget("b")
    assert turns.choose("abc") == "b"


def test_load_does_not_matter() -> None:
    assert Turns().choose("ab") == "a"
