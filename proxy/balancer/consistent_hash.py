"""Each key at one instance of a ring, or the next on it that is not loaded much more than the average.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018), weighted by work. An instance of more
weight has more points on the ring, and carries more.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.hashing import hash64, hashes
from proxy.balancer.least_loaded import least_loaded
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool

BOUND = 1.25
"""How many times the average load, with the new work in it, an instance may carry and be given more."""
POINTS = 64
"""Of each instance on the ring: shares differ by about 1 / sqrt(64)."""


class ConsistentHash(Policy):
    """A demand without a key goes to the least loaded."""

    def __init__(self, means: Means) -> None:
        """Nothing of `means` is needed."""

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        if len(pool) == 1:
            return pool.urls[0]
        if not demand.key:
            return least_loaded(pool, ledger)
        loads: NDArray[Any] = ledger.loads(pool)
        bound = BOUND * (int(loads.sum()) + demand.work) / len(pool)
        if pool.weights is not None:
            loads = loads / (pool.weights / pool.weights.mean())
        ring: Ring | None = pool.kept.get(self)
        if ring is None:
            ring = pool.kept[self] = Ring(pool)
        return pool.urls[ring.first(demand.key, loads, bound)]


class Ring:
    """The points of a pool's instances in their order, and whose each is."""

    def __init__(self, pool: Pool) -> None:
        shares = np.ones(len(pool)) if pool.weights is None else pool.weights / pool.weights.mean()
        counts = np.maximum(1, np.rint(POINTS * shares)).astype(int)
        points = np.concatenate([hashes(url, count) for url, count in zip(pool.urls, counts.tolist(), strict=True)])
        order = points.argsort(kind="stable")
        self._points: list[int] = points[order].tolist()
        self._owners: list[int] = np.repeat(np.arange(len(pool)), counts)[order].tolist()

    def first(self, key: str, loads: NDArray[Any], bound: float) -> int:
        """The position of the first instance at or after `key` with no more than `bound`, which one must have."""
        owners = self._owners
        at = bisect_left(self._points, hash64(key)) % len(owners)
        while loads.item(owners[at]) > bound:
            at = (at + 1) % len(owners)
        return owners[at]
