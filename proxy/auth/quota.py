"""How much of its limits each API key has used, counted by all workers together. No clock, no waiting.

    owners      ROWS    a hash of the key whose row it is, 0 for nobody's
    requests    ROWS    when all requests of a minute will be there again, in seconds of the clock
    tokens      ROWS    the same of tokens
    worker 0    ROWS    requests in flight
    worker 1    ROWS    …

A limit per minute is a bucket: so many at once at the most, refilled evenly. One number says how full it is: the time
at which it will be full (GCRA, ITU-T I.371). Requests pay before they begin; tokens as they are known, so that a bucket
may be overdrawn by those in flight, and the next ones wait for longer.

Every change is made under `lock`: two workers that grant the last request at the same moment would make it two. What a
worker has in flight has its own cells, for whoever sees it die to clear. A row that says what a new one would say is
given to another key when none is free.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from proxy.auth.keys import MOST, Key
from proxy.balancer.hashing import owner

MINUTE = 60.0
ROWS = 2 * MOST  # those of the file before, which may still be in use, and of the present one
_SHARED = 3 * ROWS
_CELL = 8
_GRACE = 1e-6  # seconds; what floating point may lose of a minute


class Refusal(NamedTuple):
    """What is used up, as the file names it, and in how many seconds there will be more of it."""

    limit: str
    most: int
    seconds: float


class Quota:
    """One worker's view of the buffer."""

    def __init__(
        self,
        buffer: bytearray | memoryview,
        workers: int = 1,
        worker: int = 0,
        lock: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._lock = lock
        cells = memoryview(buffer)[: size(workers)]
        self._owners = cells.cast("q")[:ROWS]
        times = cells.cast("d")
        self._requests, self._tokens = times[ROWS : 2 * ROWS], times[2 * ROWS : _SHARED]
        self._flying = cells.cast("q")[_SHARED:]
        self._mine = worker * ROWS
        self._rows: dict[str, tuple[int, int]] = {}  # by the key's name: its hash and its row, as found here

    def __repr__(self) -> str:
        return f"<Quota {np.count_nonzero(np.asarray(self._owners))} keys, {sum(self._flying)} requests in flight>"

    def enter(self, key: Key, now: float) -> Refusal | None:
        """Take a place and one request of `key`'s, until `leave`; or what keeps it from that, with nothing taken.

        Raises LookupError if all rows are in use.
        """
        with self._lock():
            row = self._row(key.name, now)
            refusal = self._refusal(key, row, now)
            if refusal is None:
                self._flying[self._mine + row] += 1
                if key.requests_per_minute:
                    _take(self._requests, row, MINUTE / key.requests_per_minute, now)
        return refusal

    def spend(self, key: Key, tokens: int, now: float) -> None:
        """`tokens` are used, between `enter` and `leave`."""
        if key.tokens_per_minute and tokens:
            with self._lock():
                self._spend(key, self._row(key.name, now), tokens, now)

    def leave(self, key: Key, tokens: int, now: float) -> None:
        """Give the place back, once for each `enter`. `tokens` more were used; below 0: fewer than were spent."""
        with self._lock():
            row = self._row(key.name, now)
            self._flying[self._mine + row] -= 1
            self._spend(key, row, tokens, now)

    def _spend(self, key: Key, row: int, tokens: int, now: float) -> None:
        if key.tokens_per_minute:
            _take(self._tokens, row, tokens * MINUTE / key.tokens_per_minute, now)

    def clear(self, worker: int) -> None:
        """A dead worker has nothing in flight."""
        np.asarray(self._flying)[worker * ROWS : (worker + 1) * ROWS] = 0

    def _refusal(self, key: Key, row: int, now: float) -> Refusal | None:
        if key.concurrent and sum(self._flying[row::ROWS]) >= key.concurrent:
            return Refusal("concurrent", key.concurrent, 0.0)
        if most := key.requests_per_minute:
            wait = max(self._requests[row], now) + MINUTE / most - now - MINUTE
            if wait > _GRACE:
                return Refusal("requests_per_minute", most, wait)
        if most := key.tokens_per_minute:
            wait = self._tokens[row] + MINUTE / most - now - MINUTE
            if wait > _GRACE:
                return Refusal("tokens_per_minute", most, wait)
        return None

    def _row(self, name: str, now: float) -> int:
        known = self._rows.get(name)
        if known is None or self._owners[known[1]] != known[0]:
            hashed = owner(name)
            known = self._rows[name] = hashed, self._assigned(hashed, now)
        return known[1]

    def _assigned(self, hashed: int, now: float) -> int:
        owners = np.asarray(self._owners)
        for wanted in (hashed, 0):
            if len(found := np.flatnonzero(owners == wanted)):
                row = int(found[0])
                break
        else:
            row = self._unused(now)
        if owners[row] != hashed:
            self._owners[row] = hashed
            self._requests[row] = self._tokens[row] = 0.0
        return row

    def _unused(self, now: float) -> int:
        times = np.maximum(np.asarray(self._requests), np.asarray(self._tokens))
        flying = np.asarray(self._flying).reshape(-1, ROWS).any(axis=0)
        found = np.flatnonzero(~flying & (times <= now))
        if not len(found):
            raise LookupError(f"{ROWS} API keys in use are all that one proxy can account for")
        return int(found[0])


def _take(times: memoryview[float], row: int, seconds: float, now: float) -> None:
    times[row] = max(times[row], now) + seconds


def size(workers: int) -> int:
    """Bytes of a buffer."""
    return _CELL * (_SHARED + workers * ROWS)


def alone() -> Quota:
    """Of one worker, in this process's own memory."""
    return Quota(bytearray(size(1)))
