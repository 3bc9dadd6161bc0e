"""The instance with the fewest active tokens for its weight, from a priority queue. The ledger charges them, not it."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias
from weakref import ref

from numpy.typing import NDArray

from proxy.balancer.board import Standing
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means, Policy
from proxy.balancer.pool import Pool

Entry: TypeAlias = tuple[float, int, str]
"""Load over weight, turn of the last use, URL: least load first, then least recently chosen, then the name for a first
choice."""


class LeastLoaded(Policy):
    """One queue for each pool, which goes with it.

    Where other processes charge instances too, nobody tells of each change, and one look at all loads costs less than
    finding out what has changed.
    """

    listens = True

    def __init__(self, means: Means) -> None:
        self._queues: list[ref[Queue]] = []  # of pools that are still in use

    def __repr__(self) -> str:
        return f"<LeastLoaded {[queue() for queue in self._queues]}>"

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        if len(pool) == 1:
            return pool.urls[0]
        if ledger.shared:
            return least_loaded(pool, ledger)
        queue: Queue | None = pool.kept.get(self)
        if queue is None:
            queue = pool.kept[self] = Queue(pool, ledger)
            self._queues.append(ref(queue, self._queues.remove))
        return queue.least()

    def changed(self, url: str, standing: Standing) -> None:
        for known in [*self._queues]:
            if (queue := known()) is not None:
                queue.change(url, standing)


class Queue:
    """A heap with lazy deletion: a changed instance gets a new entry, and the old one is dropped when it surfaces.

    Filtering a heap's list in place breaks its order (up to 10 % wrong picks at 64 servers); here stale entries are
    recognised by comparing with `_current`, and the heap is rebuilt only when most of it is stale.
    """

    __slots__ = ("__weakref__", "_current", "_heap", "_weights")

    def __init__(self, pool: Pool, ledger: Ledger) -> None:
        loads, used = _shares(pool, ledger).tolist(), ledger.used(pool).tolist()
        self._weights = None if pool.weights is None else dict(zip(pool.urls, pool.weights.tolist(), strict=True))
        self._heap: list[Entry] = [*zip(loads, used, pool.urls, strict=True)]
        self._current = dict(zip(pool.urls, self._heap, strict=True))
        heapify(self._heap)

    def __repr__(self) -> str:
        return f"{sorted(self._current.values())}"

    def least(self) -> str:
        """The first, which stays."""
        heap = self._heap
        while self._current[heap[0][2]] != heap[0]:
            heappop(heap)
        return heap[0][2]

    def change(self, url: str, standing: Standing) -> None:
        """The entry of `url`, if it is one of these; often nothing has changed."""
        current = self._current.get(url)
        if current is None:
            return
        load, used = standing
        share = load if self._weights is None else load / self._weights[url]
        if current[0] == share and current[1] == used:
            return
        entry = self._current[url] = share, used, url
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._current) + 8:
            self._heap = [*self._current.values()]
            heapify(self._heap)


def least_loaded(pool: Pool, ledger: Ledger) -> str:
    """The same choice without a queue."""
    loads = _shares(pool, ledger)
    least = (loads == loads.min()).nonzero()[0]
    return pool.urls[int(least[0] if len(least) == 1 else least[ledger.used(pool)[least].argmin()])]


def _shares(pool: Pool, ledger: Ledger) -> NDArray[Any]:
    loads = ledger.loads(pool)
    return loads if pool.weights is None else loads / pool.weights
