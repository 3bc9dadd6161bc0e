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


class Pace(Policy):
    """The least time per output token, among those with room; of equals the one used longest ago."""

    def __init__(self, means: Means) -> None:
        self._rates = means.rates

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        urls = pool.urls
        if len(urls) == 1:
            return urls[0]
        kept = ledger.loads(pool)
        found = STEP + SEQUENCE * (ledger.running(pool) + 1) + TOKEN * (kept + demand.work)
        found *= rates_of(pool, self._rates)
        found /= self._rates.typical
        for url, seconds in demand.transfer.items():
            if (at := pool.position.get(url)) is not None:
                found[at] += seconds / OUTPUT
        full = kept + (demand.room or demand.work) > self._room(pool)
        if full.any() and not full.all():
            found[full] = np.inf
        best = (found == found.min()).nonzero()[0]
        return urls[int(best[0] if len(best) == 1 else best[ledger.used(pool)[best].argmin()])]

    def _room(self, pool: Pool) -> NDArray[np.float64]:
        """Tokens of KV that each of `pool` has; without end where it does not tell."""
        room: NDArray[np.float64] | None = pool.kept.get(self)
        if room is None:
            told = (pool.by_url[url].facts.get("kv_tokens") for url in pool.urls)
            room = pool.kept[self] = np.array([np.inf if tokens is None else tokens for tokens in told], np.float64)
        return room
