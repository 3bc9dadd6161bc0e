"""The heap against a list that is searched from end to end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.balancer.board import Standing
from proxy.balancer.least_loaded import LeastLoaded
from proxy.balancer.policy import Demand, Means
from tests.support.balancing import pool

KEYS = "abcdefgh"


class AgainstNaive(RuleBasedStateMachine):
    """Loads and last uses in plain dicts, the least found by min()."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = LeastLoaded(Means())
        self.known: set[str] = set()
        self.loads: dict[str, int] = {}
        self.used: dict[str, int] = {}
        self.turn = 0

    def standing(self, key: str) -> Standing:
        return Standing(self.loads.get(key, 0), self.used.get(key, 0))

    @rule(candidates=st.sets(st.sampled_from(KEYS), min_size=1))
    def choose(self, candidates: set[str]) -> None:
        wanted = min(candidates, key=lambda key: (self.loads.get(key, 0), self.used.get(key, 0), key))
        assert self.policy.choose(pool(candidates), Demand(1), self.standing) == wanted
        self.turn += 1
        self.used[wanted] = self.turn
        self.policy.changed(wanted, self.standing(wanted))
        if len(candidates) > 1:  # the only one is chosen without a look at it
            self.known |= candidates

    @precondition(lambda self: self.known)
    @rule(data=st.data(), load=st.integers(0, 5))
    def change(self, data: st.DataObject, load: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        self.loads[key] = load
        self.policy.changed(key, self.standing(key))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """Its load and its last use stay: legs run on where an instance was removed, and it may come back."""
        key = data.draw(st.sampled_from(sorted(self.known)))
        self.policy.forget(key)
        self.known.discard(key)

    @invariant()
    def the_heap_stays_small(self) -> None:
        assert len(self.policy._heap) <= 2 * len(KEYS) + 9


AgainstNaive.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstNaive = AgainstNaive.TestCase


def test_a_late_lease_of_a_forgotten_instance_does_not_bring_it_back() -> None:
    policy = LeastLoaded(Means())
    policy.choose(pool("ab"), Demand(1), lambda key: Standing(0, 0))
    policy.forget("a")
    policy.changed("a", Standing(0, 1))
    assert repr(policy) == "<LeastLoaded [(0, 0, 'b')]>"
