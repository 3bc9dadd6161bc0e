"""Loads, leases and turns of every instance by worker, in one flat buffer. Chooses nothing, and opens no memory.

All cells are signed 64-bit integers. With W workers and R rows:

    turns       W                      the last turn that each worker has taken
    directory   R                      whose row this is: a hash of the key, 0 for nobody's
    row 0       loads W │ leases W │ used W
    row 1       …                      (R of them)

A cell has one writer. Worker w writes only cell w of each group of W, so nothing on the hot path takes a lock and no
update is lost; a total is the sum over the workers, a last use the latest of theirs. CPython stores and loads an item
of a 'q' view with one aligned 8-byte move, which every 64-bit CPU makes whole: a reader sees the old number or the
new one. A worker that dies leaves its cells behind, and `clear` gives back what they hold.

Turns order the choices of all workers without a shared counter: each is one more than the latest anybody has taken.
Two workers that choose within the same microseconds may take the same turn; the tie then goes by name.

Which row belongs to a key is agreed on under `lock`, once per key; afterwards one cell says that it still holds. A row
with no lease on it may be given to another key when none is free, which costs the old one its last use only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from blake3 import blake3

ROWS = 512
_FIRST = 8  # rows below belong to no key: a role's own totals, at its number
_CELL = 8


class Standing(NamedTuple):
    """What is known of an instance, over all workers."""

    load: int
    used: int


class Board:
    """One worker's view of the buffer."""

    def __init__(
        self,
        buffer: bytearray | memoryview,
        workers: int = 1,
        worker: int = 0,
        lock: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.workers = workers
        self._worker = worker
        self._lock = lock
        self._cells = memoryview(buffer)[: size(workers)].cast("q")
        self._width = 3 * workers
        self._rows = workers + ROWS
        self._known: dict[str, tuple[int, int]] = {}  # key → its hash and its row, to be confirmed

    def __repr__(self) -> str:
        used = sum(1 for row in range(_FIRST, ROWS) if self._cells[self.workers + row])
        return f"<Board worker {self._worker} of {self.workers}, {used} rows>"

    # ---- rows by key

    def row(self, key: str) -> int:
        """The row of `key` in every worker's view. Raises LookupError if all rows are in use."""
        known = self._known.get(key)
        if known is not None and self._cells[self.workers + known[1]] == known[0]:
            return known[1]
        with self._lock():
            found = self._assign(_hashed(key))
        self._known[key] = found
        return found[1]

    def _assign(self, hashed: int) -> tuple[int, int]:
        directory = self._cells[self.workers : self._rows].tolist()
        owned = directory[_FIRST:]
        for wanted in (hashed, 0):
            if wanted in owned:
                row = _FIRST + owned.index(wanted)
                break
        else:
            row = self._idlest()
        if directory[row] != hashed:
            start = self._rows + row * self._width
            self._cells[start : start + self._width] = memoryview(bytes(self._width * _CELL)).cast("q")
            self._cells[self.workers + row] = hashed
        return hashed, row

    def _idlest(self) -> int:
        idle = [row for row in range(_FIRST, ROWS) if not self.leases(row)]
        if not idle:
            raise LookupError(f"{ROWS - _FIRST} instances with requests on them are all that one proxy can account for")
        return min(idle, key=lambda row: self.standing(row).used)

    # ---- reading, over all workers

    def standing(self, row: int) -> Standing:
        loads = self._rows + row * self._width
        used = loads + 2 * self.workers
        if self.workers == 1:
            return Standing(self._cells[loads], self._cells[used])
        return Standing(
            sum(self._cells[loads : loads + self.workers].tolist()),
            max(self._cells[used : used + self.workers].tolist()),
        )

    def leases(self, row: int) -> int:
        start = self._rows + row * self._width + self.workers
        return sum(self._cells[start : start + self.workers].tolist())

    # ---- writing: this worker's own cells

    def turn(self) -> int:
        """Takes the next turn."""
        turn = self._cells[self._worker] = 1 + max(self._cells[: self.workers].tolist())
        return turn

    def use(self, row: int, turn: int) -> None:
        self._cells[self._rows + row * self._width + 2 * self.workers + self._worker] = turn

    def hold(self, row: int, load: int, leases: int) -> None:
        """What this worker holds of a row, in all."""
        start = self._rows + row * self._width + self._worker
        self._cells[start] = load
        self._cells[start + self.workers] = leases

    def held(self, row: int) -> tuple[int, int]:
        """Load and leases that this worker holds of a row."""
        start = self._rows + row * self._width + self._worker
        return self._cells[start], self._cells[start + self.workers]

    # ---- for whoever has seen a worker die

    def clear(self, worker: int) -> None:
        """Give back what a dead worker held. Its turns stay: the order of choices is everybody's."""
        for row in range(ROWS):
            start = self._rows + row * self._width + worker
            self._cells[start] = self._cells[start + self.workers] = 0

    def release(self) -> None:
        """Let the buffer go; nothing works afterwards."""
        self._cells.release()


def size(workers: int) -> int:
    """Bytes of a board."""
    return _CELL * (workers + ROWS + ROWS * 3 * workers)


def alone() -> Board:
    """A board of one worker, in this process's own memory."""
    return Board(bytearray(size(1)))


def _hashed(key: str) -> int:
    return int.from_bytes(blake3(key.encode()).digest(8), "little") >> 1 | 1  # never 0, never negative
