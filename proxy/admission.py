"""Who may begin now, who waits, who is refused. Pure: no clock, no waiting; `gate` does that.

An entry holds a place and its bytes from the moment it is admitted until it leaves, once, whatever happened to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heapify, heappop, heappush
from itertools import count

from proxy.errors import Overloaded, TooLarge


class Place(Enum):
    WAITING = auto()
    ADMITTED = auto()
    REFUSED = auto()  # a more urgent one has taken its place in the queue
    LEFT = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """`requests` and `nbytes` may be in flight, `queue` more may wait for `patience` seconds each."""

    requests: int
    nbytes: int
    queue: int
    patience: float


@dataclass(slots=True, order=True)
class Entry:
    """Ordered as the queue is: a lower priority number first, then who came first."""

    priority: int
    number: int
    nbytes: int = field(compare=False)
    place: Place = field(default=Place.WAITING, compare=False)


class Admission:
    """The places and the queue for them. The most urgent waits for room, and none overtakes it for being small."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.nbytes = 0
        self._queue: list[Entry] = []
        self._waiting = 0
        self._numbers = count()

    def __repr__(self) -> str:
        return f"<Admission {self.requests} requests, {self.nbytes} bytes, {self._waiting} waiting>"

    @property
    def waiting(self) -> int:
        return self._waiting

    def arrive(self, priority: int, nbytes: int) -> tuple[Entry, Entry | None]:
        """A new entry, admitted or waiting, and the one that it pushed out of a full queue.

        Raises TooLarge if it could never be admitted, Overloaded if the queue is full of others as urgent.
        """
        if nbytes > self.limits.nbytes:
            raise TooLarge(f"the body has {nbytes} bytes, more than may be in flight at all ({self.limits.nbytes})")
        entry = Entry(priority, next(self._numbers), nbytes)
        if self._fits(entry) and self._is_first(entry):
            self._admit(entry)
            return entry, None
        refused = self._make_way(entry) if self._waiting >= self.limits.queue else None
        heappush(self._queue, entry)
        self._waiting += 1
        return entry, refused

    def leave(self, entry: Entry) -> list[Entry]:
        """It ended, was cancelled, or waits no longer; the entries that are admitted in its stead. Idempotent."""
        if entry.place is Place.ADMITTED:
            self.requests -= 1
            self.nbytes -= entry.nbytes
        elif entry.place is Place.WAITING:
            self._waiting -= 1
        entry.place = Place.LEFT
        return self._promote()

    def _promote(self) -> list[Entry]:
        admitted = []
        while self._queue:
            first = self._queue[0]
            if first.place is Place.WAITING:
                if not self._fits(first):
                    break
                self._waiting -= 1
                self._admit(first)
                admitted.append(first)
            heappop(self._queue)
        return admitted

    def _make_way(self, entry: Entry) -> Entry:
        self._queue = [waiting for waiting in self._queue if waiting.place is Place.WAITING]
        heapify(self._queue)
        worst = max(self._queue, default=entry)
        if worst.priority <= entry.priority:
            raise full(self._waiting)
        worst.place = Place.REFUSED
        self._waiting -= 1
        return worst

    def _is_first(self, entry: Entry) -> bool:
        while self._queue and self._queue[0].place is not Place.WAITING:
            heappop(self._queue)
        return not self._queue or entry < self._queue[0]

    def _fits(self, entry: Entry) -> bool:
        return self.requests < self.limits.requests and self.nbytes + entry.nbytes <= self.limits.nbytes

    def _admit(self, entry: Entry) -> None:
        entry.place = Place.ADMITTED
        self.requests += 1
        self.nbytes += entry.nbytes


def full(waiting: int) -> Overloaded:
    return Overloaded(f"{waiting} requests are waiting already (--max-queue)")
