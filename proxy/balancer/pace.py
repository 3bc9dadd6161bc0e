"""Where a decode leg would get its tokens fastest: by those decoding beside it, the KV read at each step, and room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.foresight import rates_of
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool

STEP = 6e-3
"""Seconds of a step of a 7B model alone, on an H100: reading the weights."""
SEQUENCE = 16e-6
"""More for each sequence beside it."""
TOKEN = 17e-9
"""More for each token of KV, 57 KB to be read at 3.35 TB/s. With `SEQUENCE` that is 11.5 ms for 64 of 4,096."""
OUTPUT = 256
"""Tokens over which a transfer, which is waited for once, is spread."""
ALIKE = 1.5
"""Rates that differ from the typical one by less than this factor count as typical: where the three constants fit a
model badly, equal engines seem to differ by their load, and the one that seems fastest would get all there is."""
_LAST = 1e9  # whoever has no room comes after all who have


class Pace(Policy):
    """The least time per output token, among those with room; of equals the one used longest ago."""

    def __init__(self, means: Means) -> None:
        self._rates = means.rates

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        urls = pool.urls
        if len(urls) == 1:
            return urls[0]
        kept, typical = ledger.loads(pool), self._rates.typical
        found = kept * TOKEN
        found += ledger.running(pool) * SEQUENCE
        if pool.weights is not None:
            found /= pool.weights
        found += STEP + SEQUENCE + TOKEN * demand.work
        found *= _steadied(rates_of(pool, self._rates), typical)
        for url, seconds in demand.transfer.items():
            if (at := pool.position.get(url)) is not None:
                found[at] += seconds / OUTPUT * typical
        room = self._room(pool)
        if room is not None:
            np.add(found, _LAST, out=found, where=kept > room - (demand.room or demand.work))
        first = int(found.argmin())
        tied = (found == found.item(first)).nonzero()[0]
        return urls[first if len(tied) == 1 else int(tied[ledger.used(pool)[tied].argmin()])]

    def _room(self, pool: Pool) -> NDArray[np.float64] | None:
        """Tokens of KV that each of `pool` has, without end where it does not tell; None if nobody does."""
        if self not in pool.kept:
            told = [pool.by_url[url].facts.get("kv_tokens", np.inf) for url in pool.urls]
            pool.kept[self] = None if min(told) == np.inf else np.array(told, np.float64)
        room: NDArray[np.float64] | None = pool.kept[self]
        return room


def _steadied(rates: NDArray[np.float64], typical: float) -> NDArray[np.float64]:
    return np.where((rates > typical / ALIKE) & (rates < typical * ALIKE), typical, rates)
