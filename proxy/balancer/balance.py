"""A leg's instance and its lease in one step, so that no other choice sees a load in between. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.balancer.board import Board, Standing
from proxy.balancer.ledger import Lease, Ledger
from proxy.balancer.policy import Policy
from proxy.core import Instance, Role


class Balancer:
    """One policy per role, one ledger for all; with a shared board, one truth for the balancers of all workers."""

    def __init__(self, policies: Mapping[Role, Policy], board: Board | None = None) -> None:
        self._policies = policies
        self.ledger = Ledger(self._changed, board)

    def take(self, role: Role, candidates: Sequence[Instance], tokens: int) -> Lease:
        """Choose one of `candidates` (not empty) and charge it. The caller owns the lease."""
        by_url = {instance.url: instance for instance in candidates}
        policy = self._policies[role]
        for url, standing in self.ledger.news(by_url):
            policy.changed(url, standing)
        chosen = by_url[policy.choose(by_url, self.ledger.standing)]
        return self.ledger.lease(chosen, role, max(1, tokens))

    def forget(self, instance: Instance) -> None:
        self._policies[instance.role].forget(instance.url)

    def _changed(self, role: Role, url: str, standing: Standing) -> None:
        self._policies[role].changed(url, standing)
