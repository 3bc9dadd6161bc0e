"""What finished requests asked of the engines lately, over all workers: sums in which older requests count less.

Each worker adds to a row of its own in memory that all of them read; who takes a dead one's place goes on with its row.

    began   first use of the row, 0: never
    mark    time by which the sums are scaled; 0: they are being written anew
    sums    each sum of amount · exp((time - mark) / FADING), so that adding touches no other number

Times are seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, auto
from math import exp, expm1

FADING = 120.0
"""Seconds in which a request's weight falls to 1/e."""

_AHEAD = 100 * FADING  # the weight of the latest request is e^100 at the most
_BEGAN, _MARK, _SUMS = 0, 1, 2
_CELL = 8


class Sum(IntEnum):
    """Which sum. Works are in tokens, times in seconds."""

    REQUESTS = 0
    ENCODES = auto()  # items
    ENCODE_WORK = auto()
    ENCODE_SQUARES = auto()  # of each item's work
    ENCODE_TIME = auto()  # of engines, that the work took
    PROMPT = auto()
    OUTPUT = auto()
    # Over prefills whose time was seen, each by how much it tells.
    FIRST_PROMPT = auto()
    FIRST_TIME = auto()
    # Over answers whose pace was seen; the batch is how many the engine decoded at once, this one included.
    PACES = auto()
    BATCH = auto()
    BATCH_SQUARES = auto()
    PACE = auto()  # seconds per token
    BATCH_PACE = auto()  # batch · pace
    KEPT = auto()  # tokens of KV


class Flow:
    """One worker's view of all rows. Only ever used on the event loop."""

    def __init__(self, buffer: bytearray | memoryview, workers: int = 1, worker: int = 0) -> None:
        cells = memoryview(buffer)[: size(workers)].cast("d")
        width = _SUMS + len(Sum)
        self._rows = [cells[width * number : width * (number + 1)] for number in range(workers)]
        self._mine = self._rows[worker]

    def add(self, now: float, amounts: Iterable[tuple[Sum, float]]) -> None:
        """What one finished request asked."""
        mine = self._mine
        mark = mine[_MARK]
        if not 0 <= now - mark < _AHEAD or not mark:
            mark = self._rescaled(now)
        weight = exp((now - mark) / FADING)
        for what, amount in amounts:
            mine[_SUMS + what] += amount * weight

    def sums(self, now: float) -> list[float]:
        """Of all workers, by `Sum`: a request of this moment counts whole."""
        found = [0.0] * len(Sum)
        for row in self._rows:
            cells = row.tolist()
            mark = cells[_MARK]
            if mark and row[_MARK] == mark:  # else they are being written anew, once in hours
                weight = exp((mark - now) / FADING)
                found = [total + weight * own for total, own in zip(found, cells[_SUMS:], strict=True)]
        return found

    def span(self, now: float) -> float:
        """Seconds that the sums stand for: a sum divided by this is a rate."""
        began = min((row[_BEGAN] for row in self._rows if row[_BEGAN]), default=now)
        return FADING * -expm1((began - now) / FADING)

    def _rescaled(self, now: float) -> float:
        mine = self._mine
        mark, mine[_MARK] = mine[_MARK], 0.0
        weight = exp((mark - now) / FADING) if mark else 0.0  # a successor of one that died while it wrote begins anew
        for cell in range(_SUMS, len(mine)):
            mine[cell] *= weight
        mine[_BEGAN] = mine[_BEGAN] or now
        mine[_MARK] = now
        return now


def size(workers: int) -> int:
    """Bytes of the memory that so many workers share."""
    return _CELL * workers * (_SUMS + len(Sum))


def alone() -> Flow:
    """Of one worker, in this process's own memory."""
    return Flow(bytearray(size(1)))
