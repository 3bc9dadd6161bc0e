"""The heap against a list that is searched from end to end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.balancer.least_loaded import LeastLoaded, least_loaded
from proxy.balancer.ledger import Lease, Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool
from proxy.core import BOTH
from tests.support.balancing import pool

URLS = "abcdefgh"


class AgainstNaive(RuleBasedStateMachine):
    """Loads and last uses in plain dicts, the least found by min(); pools that come, stay and go."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = LeastLoaded(Means())
        self.ledger = Ledger({BOTH: self.policy.changed})
        self.pools = [pool(URLS)]
        self.leases: list[Lease] = []
        self.loads = dict.fromkeys(URLS, 0)
        self.used = dict.fromkeys(URLS, 0)
        self.turn = 0

    def least(self, candidates: Pool) -> str:
        return min(candidates, key=lambda url: (self.loads[url], self.used[url], url))

    @rule(which=st.integers(0, 2), tokens=st.integers(1, 5))
    def take(self, which: int, tokens: int) -> None:
        candidates = self.pools[which % len(self.pools)]
        url = self.policy.choose(candidates, Demand(tokens), self.ledger)
        assert url == self.least(candidates) == least_loaded(candidates, self.ledger)
        self.leases.append(self.ledger.lease(candidates.by_url[url], BOTH, tokens))
        self.turn += 1
        self.loads[url] += tokens
        self.used[url] = self.turn

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def give_back(self, which: int) -> None:
        lease = self.leases.pop(which % len(self.leases))
        self.loads[lease.instance.url] -= lease.tokens
        lease.close()

    @rule(candidates=st.sets(st.sampled_from(URLS), min_size=1))
    def the_fleet_changes(self, candidates: set[str]) -> None:
        self.pools = [*self.pools[-2:], pool(candidates)]

    @invariant()
    def queues_stay_small_and_go_with_their_pools(self) -> None:
        queues = [queue for known in self.policy._queues if (queue := known()) is not None]
        assert len(queues) == len(self.policy._queues) <= len(self.pools)
        assert all(len(queue._heap) <= 2 * len(queue._current) + 8 for queue in queues)


AgainstNaive.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstNaive = AgainstNaive.TestCase


def test_its_queue_is_shown_and_the_only_candidate_needs_none() -> None:
    policy, ledger = LeastLoaded(Means()), Ledger({})
    one, two = pool("a"), pool("ab")
    policy.choose(one, Demand(1), ledger)
    assert repr(policy) == "<LeastLoaded []>"
    policy.choose(two, Demand(1), ledger)
    assert repr(policy) == "<LeastLoaded [[(0, 0, 'a'), (0, 0, 'b')]]>"
