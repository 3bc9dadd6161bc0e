"""Anybody, by the dice. A yardstick: what it does worse than any other policy is the price of knowing nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool


class RandomChoice(Policy):
    """Each candidate with the same chance, or one by its weight."""

    joins = False

    def __init__(self, means: Means) -> None:
        self._dice = means.dice

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        return pool.urls[drawn(pool, self._dice())]


def drawn(pool: Pool, dice: float) -> int:
    """The position of one of `pool`, for a number in [0, 1)."""
    if pool.weights is None:
        return int(dice * len(pool))
    ends: NDArray[np.float64] | None = pool.kept.get(drawn)
    if ends is None:
        ends = pool.kept[drawn] = pool.weights.cumsum()
    return min(int(ends.searchsorted(dice * ends[-1], "right")), len(pool) - 1)
