"""Loads, leases and turns of every instance by worker, in one flat buffer. Chooses nothing, and opens no memory.

All cells are signed 64-bit integers; a key has one row of them, the same in every group:

    owners       ROWS   a hash of the key whose row it is, 0 for nobody's; in row 0: how often a row was given away
    worker 0:
      loads      ROWS
      leases     ROWS
      used       ROWS   turns; in row 0: the last turn that this worker has taken
    worker 1: …

A cell has one writer. A worker writes only the groups that are its own, so nothing on the hot path takes a lock and no
update is lost; a total is the sum over the workers, a last use the latest of theirs. CPython and numpy store and load
an aligned 8-byte item whole, as every 64-bit CPU does: a reader sees the old number or the new one. A worker that dies
leaves its cells behind, and `clear` gives back what they hold.

Turns order the choices of all workers without a shared counter: each is one more than the latest anybody has taken.
Two workers that choose within the same microseconds may take the same turn; the tie then goes by name.

Which row belongs to a key is agreed on under `lock`, once per key; afterwards the owner's cell says that it still
does. A row with no lease on it may be given to another key when none is free, which costs the old one its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.hashing import owner

ROWS = 2048
_FIRST = 8  # rows below belong to no key: row 0, and a role's own totals at its number
_CELL = 8
_WORKER = 3 * ROWS  # cells of one worker
_LOADS, _LEASES, _USED = ROWS, 2 * ROWS, 3 * ROWS  # where those of worker 0 begin

Counts: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.intp]
"""Of many keys: how far their cells are from worker 0's row 0, as [key], with several workers as [worker, key]."""


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
        self._lock = lock
        self._cells = memoryview(buffer)[: size(workers)].cast("q")
        self._mine = worker * _WORKER  # how far this worker's cells are from those of worker 0
        self._known: dict[str, tuple[int, int]] = {}  # by key: its hash and its row, as this worker has found it
        # The same memory in numpy's eyes: for all rows at once it is fast, for one cell it is slow.
        cells = np.frombuffer(self._cells, np.int64)
        self._owners = cells[:ROWS]
        self._groups = cells[ROWS:].reshape(workers, 3, ROWS)
        self._loads, self._leases, self._used = cells[_LOADS:], cells[_LEASES:], cells[_USED:]

    def __repr__(self) -> str:
        used = np.count_nonzero(self._owners[_FIRST:])
        return f"<Board worker {self._mine // _WORKER} of {self.workers}, {used} rows>"

    # ---- rows by key

    def row(self, key: str) -> int:
        """The row of `key` in every worker's view. Raises LookupError if all rows are in use."""
        known = self._known.get(key)
        if known is None or self._cells[known[1]] != known[0]:
            hashed = owner(key)
            with self._lock():
                known = self._known[key] = hashed, self._assign(hashed)
        return known[1]

    @property
    def given_away(self) -> int:
        """How often a row has gone from one key to another: while this stands still, rows once found stay right."""
        return self._cells[0]

    def _assign(self, hashed: int) -> int:
        for wanted in (hashed, 0):
            if len(found := np.flatnonzero(self._owners[_FIRST:] == wanted)):
                row = _FIRST + int(found[0])
                break
        else:
            row = self._idlest()
            self._cells[0] += 1
        if self._cells[row] != hashed:
            self._groups[:, :, row] = 0
            self._cells[row] = hashed
        return row

    def _idlest(self) -> int:
        idle = self._groups[:, 1, _FIRST:].sum(axis=0) == 0
        if not idle.any():
            raise LookupError(f"{ROWS - _FIRST} instances with requests on them are all that one proxy can account for")
        used = self._groups[:, 2, _FIRST:].max(axis=0)
        return _FIRST + int(np.where(idle, used, np.iinfo(np.int64).max).argmin())

    # ---- reading, over all workers

    def standing(self, row: int) -> Standing:
        cells = self._cells
        if self.workers == 1:
            return Standing(cells[_LOADS + row], cells[_USED + row])
        loads, used = cells[_LOADS + row :: _WORKER], cells[_USED + row :: _WORKER]
        return Standing(sum(loads.tolist()), max(used.tolist()))

    def leases(self, row: int) -> int:
        return sum(self._cells[_LEASES + row :: _WORKER].tolist())

    def rows(self, keys: Iterable[str]) -> Rows:
        """Of many keys, to be read together; right while `given_away` stands still."""
        rows = np.array([self.row(key) for key in keys], np.intp)
        return rows if self.workers == 1 else rows + _WORKER * np.arange(self.workers)[:, None]

    def loads(self, rows: Rows) -> Counts:
        """By key, as a new array."""
        return self._sums(self._loads[rows])

    def open_leases(self, rows: Rows) -> Counts:
        return self._sums(self._leases[rows])

    def used(self, rows: Rows) -> Counts:
        cells: Counts = self._used[rows]
        return cells if self.workers == 1 else np.maximum.reduce(cells)

    def _sums(self, cells: Counts) -> Counts:
        return cells if self.workers == 1 else np.add.reduce(cells)

    # ---- writing: this worker's own cells

    def use(self, row: int) -> None:
        """Takes the next turn, and gives it to the row."""
        cells, mine = self._cells, self._mine + _USED
        latest = cells[_USED] if self.workers == 1 else max(cells[_USED::_WORKER].tolist())
        cells[mine] = cells[mine + row] = latest + 1

    def add(self, row: int, total: int, load: int, leases: int) -> None:
        """To what this worker holds of a row, and of another that is a total."""
        cells, at, of = self._cells, self._mine + _LOADS + row, self._mine + _LOADS + total
        cells[at] += load
        cells[of] += load
        cells[at + ROWS] += leases
        cells[of + ROWS] += leases

    def held(self) -> dict[int, tuple[int, int]]:
        """Load and leases that this worker holds, of each row of which it holds any."""
        loads, leases, _ = self._groups[self._mine // _WORKER]
        return {row: (int(loads[row]), int(leases[row])) for row in np.flatnonzero(loads | leases).tolist()}

    # ---- for whoever has seen a worker die

    def clear(self, worker: int) -> None:
        """Give back what a dead worker held. Its turns stay: the order of choices is everybody's."""
        self._groups[worker, :2] = 0


def size(workers: int) -> int:
    """Bytes of a board."""
    return _CELL * (ROWS + workers * _WORKER)


def alone() -> Board:
    """A board of one worker, in this process's own memory."""
    return Board(bytearray(size(1)))
