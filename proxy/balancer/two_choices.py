"""The less loaded of two at random: nearly as even as looking at all, and robust where loads are known late.

The longest queue of n is ln ln n / ln 2 + O(1) instead of ln n / ln ln n (Azar et al. 1999; Mitzenmacher 2001).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool
from proxy.balancer.random_choice import drawn


class TwoChoices(Policy):
    """Two different candidates, each pair with the same chance; of equals the one used longer ago.

    With weights, whoever has more is drawn more often, and it is the load in proportion to them that counts.
    """

    def __init__(self, means: Means) -> None:
        self._dice = means.dice

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        urls = pool.urls
        if len(urls) == 1:
            return urls[0]
        if pool.weights is not None:
            return self._weighted(pool, pool.weights, ledger)
        first = int(self._dice() * len(urls))
        second = int(self._dice() * (len(urls) - 1))
        second += second >= first
        one, other = sorted((urls[first], urls[second]))
        return other if ledger.standing(other) < ledger.standing(one) else one

    def _weighted(self, pool: Pool, weights: NDArray[np.float64], ledger: Ledger) -> str:
        first, second = sorted(self._pair(pool, weights))

        def load(position: int) -> tuple[float, int]:
            standing = ledger.standing(pool.urls[position])
            return standing.load / weights.item(position), standing.used

        return pool.urls[second if load(second) < load(first) else first]

    def _pair(self, pool: Pool, weights: NDArray[np.float64]) -> tuple[int, int]:
        """The second is drawn from what the first leaves of the line on which each has as much as it weighs."""
        first = drawn(pool, self._dice())
        mine, all_of = weights.item(first), float(weights.sum())
        before = float(weights[:first].sum())
        at = self._dice() * (all_of - mine)
        second = drawn(pool, (at + mine if at >= before else at) / all_of)
        return first, second if second != first else (first + 1) % len(pool)
