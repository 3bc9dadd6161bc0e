"""The blocks of one embedding arena, and who gets the next ones. Numbers only: it holds no memory and reads no clock.

A request takes blocks before it is queued for the model, and perhaps more while its prompt runs and gives back what is
computed. Whoever waits is served in the order of arrival, those that run before those that are queued. The last blocks
are kept for one that runs:

    |  A  A  |  B  |  B  |  C  |.................|~~~~ spare ~~~~|     only the oldest that runs and needs more: A

so A goes on whatever B and C hold while they wait for A's KV blocks. What A takes of the spare comes back when A is
computed, and the next in age finds it there: no two requests can wait for each other, and the oldest always finishes.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from engines.ranges import merged

Run = tuple[int, int]
"""Neighbouring blocks: the first, and how many."""


@dataclass(slots=True, eq=False)
class Claim:
    """One request's place in the order. `started`: its place among those that run; None: it is queued."""

    arrival: int
    started: int | None = None
    closed: bool = False

    @property
    def rank(self) -> tuple[bool, int]:
        return self.started is None, self.arrival if self.started is None else self.started

    def __repr__(self) -> str:
        return f"<Claim {self.arrival} {'queued' if self.started is None else f'started {self.started}'}>"


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    claim: Claim
    least: int
    most: int
    runs: asyncio.Future[list[Run]]


class EmbeddingPool:
    """`capacity` blocks, the last `spare` of which are kept for the oldest request that runs. On the loop."""

    def __init__(self, capacity: int, spare: int) -> None:
        self.capacity, self.spare = capacity, spare
        self.free = capacity
        self._holes = [(0, capacity)] if capacity else []  # (begin, end), sorted, never touching
        self._running: list[Claim] = []  # oldest first, while they may need more
        self._waiters: list[Waiter] = []
        self._numbers = count()

    @property
    def usable(self) -> int:
        """The most that a request can get at once."""
        return self.capacity - self.spare

    def claim(self) -> Claim:
        return Claim(next(self._numbers))

    def start(self, claim: Claim) -> None:
        """It runs: what it holds comes back, unless it needs more. Idempotent."""
        if claim.started is None and not claim.closed:
            claim.started = next(self._numbers)
            self._running.append(claim)
            self._serve()

    def close(self, claim: Claim) -> None:
        """It has all that it needs, or has ended. Idempotent."""
        claim.closed = True
        if claim in self._running:
            self._running.remove(claim)
            self._serve()

    async def take(self, claim: Claim, least: int, most: int) -> list[Run]:
        """From `least` to `most` blocks, in as few runs as may be; waits for its turn and for room, without end."""
        waiter = Waiter(claim, least, most, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._serve()
        try:
            return await waiter.runs
        except asyncio.CancelledError:
            if not waiter.runs.cancelled():
                self.give_back(waiter.runs.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._serve()

    def give_back(self, runs: Sequence[Run]) -> None:
        """Raises RuntimeError if a block is free already."""
        holes = list(self._holes)
        for first, length in runs:
            insort(holes, (first, first + length))
        if any(begin < end for (_, end), (begin, _) in pairwise(holes)):
            raise RuntimeError(f"blocks {list(runs)} are given back twice: {self!r}")
        self._holes = merged(holes)
        self.free += size(runs)
        self._serve()

    def _serve(self) -> None:
        for waiter in sorted(self._waiters, key=lambda waiter: waiter.claim.rank):
            room = self.free if self._running[:1] == [waiter.claim] else self.free - self.spare
            if waiter.runs.done():
                continue  # cancelled a moment ago
            if room < waiter.least:
                break
            self._waiters.remove(waiter)
            waiter.runs.set_result(self._take(min(room, waiter.most)))

    def _take(self, wanted: int) -> list[Run]:
        """The first hole that is large enough, else the first holes."""
        self.free -= wanted
        runs: list[Run] = []
        fitting = next((hole for hole in self._holes if hole[1] - hole[0] >= wanted), None)
        for begin, end in [fitting] if fitting else list(self._holes):
            length = min(end - begin, wanted - size(runs))
            if not length:
                break
            runs.append((begin, length))
            at = self._holes.index((begin, end))
            self._holes[at : at + 1] = [(begin + length, end)] if begin + length < end else []
        return runs

    def check(self) -> None:
        """Raise RuntimeError unless the holes are as many blocks as are free, and each lies in the pool once."""
        ends = [0, *(end for hole in self._holes for end in hole), self.capacity]
        if sum(end - begin for begin, end in self._holes) != self.free or ends != sorted(ends):
            raise RuntimeError(f"holes {self._holes} are not {self.free} of {self.capacity} blocks")

    def __repr__(self) -> str:
        return f"<EmbeddingPool {self.free}/{self.capacity} free, {len(self._waiters)} wait, {self._running} run>"


def size(runs: Sequence[Run]) -> int:
    """Blocks in these runs."""
    return sum(length for _, length in runs)


def split(runs: Sequence[Run], wanted: int) -> tuple[list[Run], list[Run]]:
    """The first `wanted` blocks of these runs, or all, and the others."""
    head: list[Run] = []
    tail: list[Run] = []
    for first, length in runs:
        mine = min(length, wanted - size(head))
        if mine:
            head.append((first, mine))
        if mine < length:
            tail.append((first + mine, length - mine))
    return head, tail
