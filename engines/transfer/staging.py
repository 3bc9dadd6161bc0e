"""Slots of registered memory through which scattered blocks travel as one piece, and the plan of what travels so.

    blocks ─ gather ▶ sender's slot ── one write ──▶ receiver's slot ─ scatter ▶ blocks      (each step only if needed)

For transports that pay per descriptor. Mooncake over TCP, 1000 × 16 KiB: 40 ms block by block, 10 ms gathered.
"""

from __future__ import annotations

import threading

import numpy as np

from engines.transfer.spans import Moves, Table

SLOT = 8 << 20
FEW = 32
"""Up to this many moves go directly: a round trip for slots would cost more."""
LARGE = 64 << 10
"""Moves of this average size go directly: copying twice would cost more than a descriptor, about 30 µs."""


class Slots:
    """A fixed pool; each slot is free or leased to an owner. Thread-safe, never waits."""

    def __init__(self, count: int, size: int = SLOT) -> None:
        self.size = size
        self.array = np.zeros(count * size, dtype=np.uint8)
        self._owners: list[str | None] = [None] * count
        self._lock = threading.Lock()

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @property
    def leased(self) -> int:
        return sum(owner is not None for owner in self._owners)

    def lease(self, owner: str, most: int) -> list[int]:
        """Up to `most` slots, as offsets into the pool; fewer, or none, when others hold them."""
        with self._lock:
            free = [index for index, held in enumerate(self._owners) if held is None][:most]
            for index in free:
                self._owners[index] = owner
        return [index * self.size for index in free]

    def holds(self, owner: str, offset: int) -> bool:
        index, rest = divmod(offset, self.size)
        return rest == 0 and 0 <= index < len(self._owners) and self._owners[index] == owner

    def give_back(self, owner: str) -> None:
        with self._lock:
            self._owners = [None if held == owner else held for held in self._owners]


def worth_staging(moves: Moves) -> bool:
    return len(moves) > FEW and int(moves[:, 2].sum()) < LARGE * len(moves)


def batches(moves: Moves, size: int) -> list[Moves]:
    """Cut at least one move into consecutive batches of `size` bytes and a rest, splitting a move where it must be."""
    ends = np.cumsum(moves[:, 2])
    cuts = np.arange(size, int(ends[-1]), size)
    last = np.searchsorted(ends, cuts)
    if (ends[last] != cuts).any():
        pieces = np.union1d(ends, cuts)
        starts = np.r_[0, pieces[:-1]]
        row = np.searchsorted(ends, starts, side="right")
        skipped = starts - (ends[row] - moves[row, 2])
        moves = np.stack((moves[row, 0] + skipped, moves[row, 1] + skipped, pieces - starts), axis=1)
        last = np.searchsorted(pieces, cuts)
    return np.split(moves, last + 1)


def packed(lengths: Table, start: int) -> Table:
    """Offsets of pieces that lie one after the other from `start`."""
    return start + np.cumsum(lengths) - lengths


def one_run(offsets: Table, lengths: Table) -> bool:
    return bool((offsets[1:] == offsets[:-1] + lengths[:-1]).all())
