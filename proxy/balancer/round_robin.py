"""Instances in turn, whatever they carry. The published baseline; turns are the ledger's."""

from __future__ import annotations

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool


class RoundRobin(Policy):
    """The candidate that was chosen longest ago, by whichever worker: turns stay fair while instances come and go."""

    joins = False

    def __init__(self, means: Means) -> None:
        """Nothing of `means` is needed."""

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        return pool.urls[0] if len(pool) == 1 else pool.urls[int(ledger.used(pool).argmin())]
