"""Instances in turn, whatever they carry. The published baseline; turns are the ledger's."""

from __future__ import annotations

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool


class RoundRobin(Policy):
    """The candidate that was chosen longest ago, by whichever worker: turns stay fair while instances come and go.

    With weights, each worker for itself lets one of weight 3 have its turn three times as often as one of weight 1.
    """

    joins = False

    def __init__(self, means: Means) -> None:
        """Nothing of `means` is needed."""

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        if len(pool) == 1:
            return pool.urls[0]
        if pool.weights is None:
            return pool.urls[int(ledger.used(pool).argmin())]
        due = pool.kept.get(self)
        if due is None:
            due = pool.kept[self] = 1 / pool.weights
        first = int(due.argmin())
        due[first] += 1 / pool.weights[first]
        return pool.urls[first]
