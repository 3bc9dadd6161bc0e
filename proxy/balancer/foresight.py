"""When a demand would be done, at each instance of a pool: what is ahead of it there, its own work, and transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates

DOUBT = 1 / 16
"""Of what is held, and there at once, the part that turns out not to be: it waits and costs like anything else."""
_STEP = 16  # rates of a pool that are read again at each look, while any have changed


def times(pool: Pool, demand: Demand, ledger: Ledger, rates: Rates, *, weighed: bool = False) -> NDArray[np.float64]:
    """Seconds from now until `demand` would be done, in the pool's order: max(ready, pending) + work + transfer.

    `weighed`: no prediction, but what a choice goes by: where the weight is 2, half of what is pending counts.
    """
    each = rates_of(pool, rates)
    loads: NDArray[Any] = ledger.loads(pool)
    if weighed and pool.weights is not None:
        loads = loads / pool.weights
    if demand.ready > 0:
        found = np.maximum(loads * each, demand.ready) + demand.work * each
    else:
        found = (loads + demand.work) * each
    for url, work in demand.held.items():
        if (at := pool.position.get(url)) is not None:
            if demand.at_once:
                found[at] = DOUBT * found.item(at) + work * each.item(at)
            else:
                found[at] -= (demand.work - work) * each.item(at)
    for url, seconds in demand.transfer.items():
        if (at := pool.position.get(url)) is not None:
            found[at] += seconds
    return found


def soonest(pool: Pool, demand: Demand, ledger: Ledger, rates: Rates) -> float:
    """The least of `times`."""
    if len(pool) > 1:
        return float(times(pool, demand, ledger, rates).min())
    url = pool.urls[0]
    rate = rates.seconds(url)
    waiting = max(demand.ready, ledger.load(url) * rate)
    if demand.at_once and url in demand.held:
        waiting = DOUBT * (waiting + demand.work * rate)
    return waiting + demand.at(url) * rate + demand.transfer.get(url, 0.0)


def rates_of(pool: Pool, rates: Rates) -> NDArray[np.float64]:
    """Seconds per token of work of each of `pool`, in its order; not to be written to.

    With every leg some rate may change. A large pool's are read again a few at a time, so that no look takes long.
    """
    known: _Known | None = pool.kept.get(rates)
    if known is None:
        known = pool.kept[rates] = _Known(pool, rates)
    known.refresh(pool, rates)
    return known.rates


class _Known:
    """The rates of a pool as they were when they were last read."""

    __slots__ = ("_next", "_stale", "_version", "rates")

    def __init__(self, pool: Pool, rates: Rates) -> None:
        self.rates = np.array([rates.seconds(url) for url in pool.urls])
        self._version = rates.version
        self._stale = 0  # how many are still to be read again
        self._next = 0

    def refresh(self, pool: Pool, rates: Rates) -> None:
        if self._version != rates.version:
            self._version, self._stale = rates.version, len(pool)
        if self._stale > 0:
            urls = pool.urls[self._next : self._next + _STEP]
            self.rates[self._next : self._next + len(urls)] = [rates.seconds(url) for url in urls]
            self._stale -= len(urls)
            self._next = self._next + _STEP if self._next + _STEP < len(pool) else 0
