"""A leg's instance and its lease in one step, so that no other choice sees a load in between. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.balancer.board import Board, Standing
from proxy.balancer.ledger import Lease, Ledger
from proxy.balancer.policy import Demand, Policy
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, Instance, Role

PRIORS = {Role.ENCODE: 15e-6, Role.PREFILL: 25e-6, Role.DECODE: 25e-6, BOTH: 25e-6}
"""Seconds per token of work: a vision token of Qwen3-VL at 720p on an H100, and a token of a 7B model's prefill."""


class Balancer:
    """One policy and one set of rates per role, one ledger for all; with a shared board, one truth for all workers."""

    def __init__(
        self, policies: Mapping[Role, Policy], board: Board | None = None, rates: Mapping[Role, Rates] | None = None
    ) -> None:
        self._policies = policies
        self.rates = rates or {role: Rates(prior) for role, prior in PRIORS.items()}
        self.ledger = Ledger(self._changed, board)

    def take(self, role: Role, pool: Pool, demand: Demand) -> Lease:
        """Choose one of `pool` (not empty) and charge it. The caller owns the lease."""
        policy = self._policies[role]
        for url, standing in self.ledger.news(pool):
            policy.changed(url, standing)
        url = policy.choose(pool, demand, self.ledger.standing)
        return self.ledger.lease(pool.by_url[url], role, demand.at(url))

    def foresee(self, role: Role, pool: Pool, demand: Demand) -> float:
        """Seconds until the leg would be done where that is soonest. Nothing is charged; `pool` is not empty."""
        rates, load = self.rates[role], self.ledger.load
        return min(
            max(demand.ready, load(url) * rates.seconds(url))
            + demand.at(url) * rates.seconds(url)
            + demand.transfer.get(url, 0.0)
            for url in pool
        )

    def forget(self, instance: Instance) -> None:
        self._policies[instance.role].forget(instance.url)
        self.rates[instance.role].forget(instance.url)

    def _changed(self, role: Role, url: str, standing: Standing) -> None:
        self._policies[role].changed(url, standing)
