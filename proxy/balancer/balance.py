"""A leg's instance and its lease in one step, so that no other choice sees a load in between. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.balancer.ledger import Lease, Ledger
from proxy.balancer.policy import Policy
from proxy.core import Instance, Role


class Balancer:
    """One policy per role, one ledger for all."""

    def __init__(self, policies: Mapping[Role, Policy]) -> None:
        self._policies = policies
        self.ledger = Ledger(self._changed)

    def take(self, role: Role, candidates: Sequence[Instance], tokens: int) -> Lease:
        """Choose one of `candidates` (not empty) and charge it. The caller owns the lease."""
        by_url = {instance.url: instance for instance in candidates}
        chosen = by_url[self._policies[role].choose(by_url)]
        return self.ledger.lease(chosen, role, max(1, tokens))

    def forget(self, instance: Instance) -> None:
        self._policies[instance.role].forget(instance.url)

    def _changed(self, role: Role, url: str, load: int) -> None:
        self._policies[role].changed(url, load)
