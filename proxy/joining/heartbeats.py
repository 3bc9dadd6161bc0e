"""Until when registered engines count as alive, as all workers of one proxy see it. Pure: the clock is passed in.

One table of cells of 8 bytes in shared memory, a row for each URL:

    keys     ROWS   a hash of the URL, 0 for nobody's row
    lives    ROWS   a hash of what the process calls itself
    until    ROWS   the monotonic clock's nanoseconds, the same in all processes of a machine

A heartbeat is two stores without a lock, and no news for anybody: the fleet itself is written when an engine comes or
goes, not because it is still there. Rows are given and taken back under `lock`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from proxy.balancer.hashing import owner

ROWS = 2048
SIZE = 3 * 8 * ROWS
_NANO = 1e9


class Heartbeats:
    """One process's view of the table."""

    def __init__(
        self, buffer: bytearray | memoryview, lock: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        cells = np.frombuffer(buffer, np.int64, 3 * ROWS).reshape(3, ROWS)
        self._keys, self._lives, self._until = cells
        self._lock = lock

    def __repr__(self) -> str:
        return f"<Heartbeats of {np.count_nonzero(self._keys)}>"

    def beat(self, url: str, life: str, until: float) -> None:
        """The process that calls itself `life` is alive, and will be until then. Raises LookupError if the table is
        full."""
        row = self._row(url)
        if row is None:
            with self._lock():
                row = self._row(url)
                if row is None:
                    row = self._free()
                    self._keys[row] = owner(url)
        self._lives[row] = owner(life)
        self._until[row] = int(until * _NANO)

    def knows(self, url: str, life: str) -> bool:
        """Whether the last heartbeat of this URL came from the same process."""
        row = self._row(url)
        return row is not None and int(self._lives[row]) == owner(life)

    def until(self, url: str) -> float | None:
        """When it is to be alive no more, unless it says otherwise; None if it never said anything."""
        row = self._row(url)
        return None if row is None else int(self._until[row]) / _NANO

    def late(self, now: float) -> bool:
        """Whether anybody is to be alive no more."""
        return bool(((self._keys != 0) & (self._until <= int(now * _NANO))).any())

    def excuse(self, seconds: float) -> None:
        """Everybody has so much longer: nobody has listened meanwhile."""
        self._until[self._keys != 0] += int(seconds * _NANO)

    def forget(self, url: str) -> None:
        """Nothing is expected of it any more. Unknown ones are ignored."""
        with self._lock():
            row = self._row(url)
            if row is not None:
                self._until[row] = self._lives[row] = self._keys[row] = 0

    def _row(self, url: str) -> int | None:
        found = np.flatnonzero(self._keys == owner(url))
        return int(found[0]) if len(found) else None

    def _free(self) -> int:
        found = np.flatnonzero(self._keys == 0)
        if not len(found):
            raise LookupError(f"{ROWS} registered engines are all that one proxy watches")
        return int(found[0])


def alone() -> Heartbeats:
    """In this process's own memory."""
    return Heartbeats(bytearray(SIZE))
