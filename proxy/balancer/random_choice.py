"""Anybody, by the dice. A yardstick: what it does worse than any other policy is the price of knowing nothing."""

from __future__ import annotations

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool


class RandomChoice(Policy):
    """Each candidate with the same chance."""

    joins = False

    def __init__(self, means: Means) -> None:
        self._dice = means.dice

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        return pool.urls[int(self._dice() * len(pool))]
