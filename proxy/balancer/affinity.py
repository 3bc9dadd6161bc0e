"""Where a demand would be done soonest: pending work, what is left to do where part of it is held, and transfer.

Of those that are about as soon, each key has its own order, the same in every worker and replica: so a thing comes to
one instance's cache instead of to all, and who joins or leaves moves only its own share.

How fast each instance is has been learnt: a weight says that it is to have more, or less, than its speed earns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.foresight import rates_of, times
from proxy.balancer.hashing import hashes, highest
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool

TIE = 0.1
"""Of the demand's own cost where it would be done first: who is later by no more than this is about as soon."""


class Affinity(Policy):
    """A demand without a key goes to whoever was used longest ago of those."""

    def __init__(self, means: Means) -> None:
        self._rates = means.rates

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        urls = pool.urls
        if len(urls) == 1:
            return urls[0]
        found = self.times = times(pool, demand, ledger, self._rates, weighed=True)
        first = int(found.argmin())
        own = demand.at(urls[first]) * rates_of(pool, self._rates).item(first)
        tied = (found <= found.item(first) + TIE * own).nonzero()[0]
        if len(tied) == 1:
            return urls[first]
        if not demand.key:
            return urls[int(tied[ledger.used(pool)[tied].argmin()])]
        return urls[int(tied[highest(self._members(pool)[tied], demand.key)])]

    def _members(self, pool: Pool) -> NDArray[np.uint64]:
        members: NDArray[np.uint64] | None = pool.kept.get(self)
        if members is None:
            members = pool.kept[self] = np.concatenate([hashes(url, 1) for url in pool.urls])
        return members
