"""Loads, leases and turns of every instance by worker, in one flat buffer. Chooses nothing, and opens no memory.

All cells are signed 64-bit integers. With W workers:

    turns     W                                              the last turn that each worker has taken
    row 0     owner 1 │ loads W │ leases W │ used W          owner: a hash of the key whose row it is, 0 for nobody's
    row 1     …                                              (ROWS of them)

A cell has one writer. Worker w writes only cell w of each group of W, so nothing on the hot path takes a lock and no
update is lost; a total is the sum over the workers, a last use the latest of theirs. CPython stores and loads an item
of a 'q' view with one aligned 8-byte move, which every 64-bit CPU makes whole: a reader sees the old number or the
new one. A worker that dies leaves its cells behind, and `clear` gives back what they hold.

Turns order the choices of all workers without a shared counter: each is one more than the latest anybody has taken.
Two workers that choose within the same microseconds may take the same turn; the tie then goes by name.

Which row belongs to a key is agreed on under `lock`, once per key; afterwards the owner's cell says that it still
does. A row with no lease on it may be given to another key when none is free, which costs the old one its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from struct import Struct
from typing import NamedTuple

from blake3 import blake3

ROWS = 512
_FIRST = 8  # rows below belong to no key: a role's own totals, at its number
_CELL = 8


class Standing(NamedTuple):
    """What is known of an instance, over all workers."""

    load: int
    used: int


class _Row:
    """A key's row, as this worker has found it."""

    __slots__ = ("cells", "hashed", "number", "told")

    def __init__(self, hashed: int, number: int, cells: memoryview[int]) -> None:
        self.hashed = hashed
        self.number = number
        self.cells = cells
        self.told = b""  # its bytes when `news` last told of it


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
        self._width = 1 + 3 * workers
        self._mine = workers + 1 + worker  # this worker's load of row 0
        self._unpack = Struct(f"{self._width}q").unpack
        self._known: dict[str, _Row] = {}

    def __repr__(self) -> str:
        used = sum(1 for row in range(_FIRST, ROWS) if self._cells[self._start(row)])
        return f"<Board worker {self._worker} of {self.workers}, {used} rows>"

    # ---- rows by key

    def row(self, key: str) -> int:
        """The row of `key` in every worker's view. Raises LookupError if all rows are in use."""
        return self._row(key).number

    def _row(self, key: str) -> _Row:
        known = self._known.get(key)
        if known is None or known.cells[0] != known.hashed:
            hashed = _hashed(key)
            with self._lock():
                number = self._assign(hashed)
            start = self._start(number)
            known = self._known[key] = _Row(hashed, number, self._cells[start : start + self._width])
        return known

    def _assign(self, hashed: int) -> int:
        owners = self._cells[self._start(_FIRST) :: self._width].tolist()
        for wanted in (hashed, 0):
            if wanted in owners:
                row = _FIRST + owners.index(wanted)
                break
        else:
            row = self._idlest()
        start = self._start(row)
        if self._cells[start] != hashed:
            for cell in range(start + 1, start + self._width):
                self._cells[cell] = 0
            self._cells[start] = hashed
        return row

    def _idlest(self) -> int:
        idle = [row for row in range(_FIRST, ROWS) if not self.leases(row)]
        if not idle:
            raise LookupError(f"{ROWS - _FIRST} instances with requests on them are all that one proxy can account for")
        return min(idle, key=lambda row: self.standing(row).used)

    def _start(self, row: int) -> int:
        return self.workers + row * self._width

    # ---- reading, over all workers

    def standing(self, row: int) -> Standing:
        start = self._start(row)
        return self._read(self._cells[start : start + self._width].tobytes())

    def _read(self, row: bytes) -> Standing:
        cells = self._unpack(row)
        return Standing(sum(cells[1 : 1 + self.workers]), max(cells[-self.workers :]))

    def seen(self, key: str) -> Standing:
        """The standing of `key`, which is no news afterwards."""
        row = self._row(key)
        if self.workers == 1:
            _, load, _, used = row.cells
            return Standing(load, used)
        row.told = row.cells.tobytes()
        return self._read(row.told)

    def news(self, keys: Iterable[str]) -> list[tuple[str, Standing]]:
        """The standing of each of `keys` on whose row anything has changed since it was last seen or told of here."""
        found = []
        for key in keys:
            row = self._known.get(key)
            if row is None or row.cells.tobytes() != row.told:  # this may be because it is another's row now
                found.append((key, self.seen(key)))
        return found

    def leases(self, row: int) -> int:
        start = self._start(row) + 1 + self.workers
        return sum(self._cells[start : start + self.workers].tolist())

    # ---- writing: this worker's own cells

    def turn(self) -> int:
        """Takes the next turn."""
        cells = self._cells
        turn = cells[self._worker] = 1 + (cells[0] if self.workers == 1 else max(cells[: self.workers].tolist()))
        return turn

    def use(self, row: int, turn: int) -> None:
        self._cells[self._mine + row * self._width + 2 * self.workers] = turn

    def add(self, row: int, load: int, leases: int) -> None:
        """To what this worker holds of a row."""
        cells, at = self._cells, self._mine + row * self._width
        cells[at] += load
        cells[at + self.workers] += leases

    def held(self) -> dict[int, tuple[int, int]]:
        """Load and leases that this worker holds, of each row of which it holds any."""
        loads = self._cells[self._mine :: self._width].tolist()
        leases = self._cells[self._mine + self.workers :: self._width].tolist()
        held = zip(loads, leases, strict=True)
        return {row: found for row, found in enumerate(held) if any(found)}

    # ---- for whoever has seen a worker die

    def clear(self, worker: int) -> None:
        """Give back what a dead worker held. Its turns stay: the order of choices is everybody's."""
        for row in range(ROWS):
            start = self._start(row) + 1 + worker
            self._cells[start] = self._cells[start + self.workers] = 0


def size(workers: int) -> int:
    """Bytes of a board."""
    return _CELL * (workers + ROWS * (1 + 3 * workers))


def alone() -> Board:
    """A board of one worker, in this process's own memory."""
    return Board(bytearray(size(1)))


def _hashed(key: str) -> int:
    return int.from_bytes(blake3(key.encode()).digest(8), "little") >> 1 | 1  # never 0, never negative
