"""The less loaded of two at random: nearly as even as looking at all, and robust where loads are known late.

The longest queue of n is ln ln n / ln 2 + O(1) instead of ln n / ln ln n (Azar et al. 1999; Mitzenmacher 2001).
"""

from __future__ import annotations

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool


class TwoChoices(Policy):
    """Two different candidates, each pair with the same chance; of equals the one used longer ago."""

    def __init__(self, means: Means) -> None:
        self._dice = means.dice

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        urls = pool.urls
        if len(urls) == 1:
            return urls[0]
        first = int(self._dice() * len(urls))
        second = int(self._dice() * (len(urls) - 1))
        second += second >= first
        one, other = sorted((urls[first], urls[second]))
        return other if ledger.standing(other) < ledger.standing(one) else one
