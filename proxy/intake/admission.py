"""Who may begin now, who waits, who is refused. Pure: no clock, no waiting; `gate` does that.

An entry holds a place and its bytes from the moment it is admitted until it leaves, once, whatever happened to it.

One that wishes for more than a place (its first token in time, a pace, room for its embeddings) begins only if that is
foreseen. It is parked while waiting may help, and refused when not even idle engines would be in time any more. The
queue is ordered by priority, then by deadline, then by arrival. Who is parked holds back those behind it that need the
same engines: all of them, except that text passes media that wait for encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from proxy.core import Stage
from proxy.errors import Overloaded, TooLarge, TooLate

_ALONE = 1.05  # a foreseen time this near to that of idle engines is theirs


class Place(Enum):
    WAITING = auto()
    ADMITTED = auto()
    REFUSED = auto()  # another has taken its place in the queue
    LEFT = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """`requests` and `nbytes` may be in flight, `queue` more may wait for `patience` seconds each."""

    requests: int
    nbytes: int
    queue: int
    patience: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request would get if it began now, and what it would get of idle engines; in seconds."""

    first: float  # until its first token
    first_idle: float
    pace: float  # per output token
    pace_idle: float
    stage: Stage  # where it would wait longest
    room: bool = True  # its embeddings may be on their way to a prefill engine now


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs beside a place. Absent wishes are infinite."""

    media: bool
    foresee: Callable[[], Outlook]  # as things stand when it is called
    first: float = inf  # seconds from its arrival to its first token
    pace: float = inf  # seconds per output token


@dataclass(slots=True, order=True)
class Entry:
    """Ordered as the queue is: a lower priority number first, then the earlier deadline, then who came first."""

    priority: int
    deadline: float  # of its first token
    number: int
    nbytes: int = field(compare=False)
    wish: Wish | None = field(default=None, compare=False)
    latest: float = field(default=inf, compare=False)  # when waiting is of no use any more
    parked: Stage | None = field(default=None, compare=False)  # what it waits for, if that is more than a place
    place: Place = field(default=Place.WAITING, compare=False)

    @property
    def media(self) -> bool:
        return self.wish is not None and self.wish.media


class Admission:
    """The places and the queue for them. The most urgent waits for room, and none overtakes it for being small."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.nbytes = 0
        self._lanes: dict[bool, list[Entry]] = {False: [], True: []}  # heaps: of media that may be parked, and others
        self._waiting = 0
        self._numbers = count()

    def __repr__(self) -> str:
        return f"<Admission {self.requests} requests, {self.nbytes} bytes, {self._waiting} waiting>"

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def wishing(self) -> bool:
        """Whether somebody waits who may be admitted though nobody leaves."""
        return any(head.wish is not None for head in self._heads())

    def arrive(
        self, priority: int, nbytes: int, wish: Wish | None = None, now: float = 0.0
    ) -> tuple[Entry, Entry | None]:
        """A new entry, admitted or waiting, and the one that it pushed out of a full queue.

        Raises TooLarge if it could never be admitted, TooLate if waiting cannot help, Overloaded if the queue is full
        of others as urgent.
        """
        if nbytes > self.limits.nbytes:
            raise TooLarge(f"the body has {nbytes} bytes, more than may be in flight at all ({self.limits.nbytes})")
        entry = Entry(priority, inf, next(self._numbers), nbytes, wish)
        if wish is not None:
            entry.deadline = now + wish.first
        if self._is_next(entry) and self._fits(entry) and self._timely(entry, now):
            self._admit(entry)
            return entry, None
        if wish is not None:
            outlook = wish.foresee()
            entry.latest = entry.deadline - outlook.first_idle
            if entry.latest <= now:
                raise late(entry, wish, outlook)
        refused = self._make_way(entry) if self._waiting >= self.limits.queue else None
        heappush(self._lanes[entry.media], entry)
        self._waiting += 1
        return entry, refused

    def leave(self, entry: Entry, now: float = 0.0) -> list[Entry]:
        """It ended, was cancelled, or waits no longer; the entries that are admitted in its stead. Idempotent."""
        if entry.place is Place.ADMITTED:
            self.requests -= 1
            self.nbytes -= entry.nbytes
        elif entry.place is Place.WAITING:
            self._waiting -= 1
        entry.place = Place.LEFT
        return self.promote(now)

    def promote(self, now: float) -> list[Entry]:
        """Admit who may begin. One with a wish is the last: what it takes is foreseen once it has begun."""
        if not self._waiting:
            return []
        admitted = []
        closed: set[bool] = set()  # lanes
        while head := min((head for head in self._heads() if head.media not in closed), default=None):
            if not self._fits(head):
                break
            if self._timely(head, now):
                heappop(self._lanes[head.media])
                self._waiting -= 1
                self._admit(head)
                admitted.append(head)
                if head.wish is not None:
                    break
            elif head.parked is Stage.ENCODE:
                closed.add(head.media)
            else:
                break
        return admitted

    def _heads(self) -> Iterator[Entry]:
        """The first that waits of each lane."""
        for lane in self._lanes.values():
            while lane and lane[0].place is not Place.WAITING:
                heappop(lane)
            if lane:
                yield lane[0]

    def _is_next(self, entry: Entry) -> bool:
        """Nobody waits whom it must not pass."""
        return not self._waiting or all(
            entry < head or (head.parked is Stage.ENCODE and head.media != entry.media) for head in self._heads()
        )

    def _fits(self, entry: Entry) -> bool:
        return self.requests < self.limits.requests and self.nbytes + entry.nbytes <= self.limits.nbytes

    def _timely(self, entry: Entry, now: float) -> bool:
        """Whether it would get what it wishes, or all that idle engines can give: then it is in nobody's way, and what
        it takes corrects what is foreseen."""
        wish = entry.wish
        if wish is None:
            return True
        outlook = wish.foresee()
        if not outlook.room:
            entry.parked = Stage.ENCODE
        elif now + outlook.first > entry.deadline and outlook.first > outlook.first_idle * _ALONE:
            entry.parked = outlook.stage
        elif outlook.pace > wish.pace and outlook.pace > outlook.pace_idle * _ALONE:
            entry.parked = Stage.DECODE
        else:
            entry.parked = None
        return entry.parked is None

    def _make_way(self, entry: Entry) -> Entry:
        for media, lane in self._lanes.items():
            self._lanes[media] = [waiting for waiting in lane if waiting.place is Place.WAITING]
            heapify(self._lanes[media])
        encoders = any(head.media and head.parked is Stage.ENCODE for head in self._heads())

        def rank(one: Entry) -> tuple[int, bool]:
            return one.priority, encoders and one.media  # to shed media helps where encoders are what is short

        waiting = (one for lane in self._lanes.values() for one in lane)
        worst = max(waiting, key=lambda one: (rank(one), one), default=None)
        if worst is None or rank(worst) <= rank(entry):
            raise full(self._waiting)
        worst.place = Place.REFUSED
        self._waiting -= 1
        return worst

    def _admit(self, entry: Entry) -> None:
        entry.place = Place.ADMITTED
        self.requests += 1
        self.nbytes += entry.nbytes


def full(waiting: int) -> Overloaded:
    return Overloaded(f"{waiting} requests are waiting already (--max-queue)")


def late(entry: Entry, wish: Wish, outlook: Outlook) -> TooLate:
    """What to tell one that waits in vain, with the time that it may take until the engines are idle."""
    backlog = outlook.first - outlook.first_idle
    if entry.parked is Stage.DECODE:
        what = f"tokens are wished for every {wish.pace:g} s (--tpot-target)"
        now = f"now each would take {outlook.pace:.2g} s, and idle engines would take {outlook.pace_idle:.2g} s"
    else:
        what = f"the first token is wished for within {wish.first:g} s (--ttft-target, x-ttft-target)"
        busy = f"now it would take {outlook.first:.2g} s, most of it for {outlook.stage}"
        if entry.parked is None:
            busy = "others wait before it"
        now = f"{busy}, and idle engines would take {outlook.first_idle:.2g} s"
    return TooLate(f"{what}: {now}", backlog)
