"""Says which embedding lies where in the arena, and which one goes when room is needed. It touches no bytes and
no clock.

    arena   |  A  |  B  |.....|   C   |..............|     ranges never overlap; dots are free
    entry   FILLING ──commit──▶ READY ──evict──▶ LEAVING ──freed──▶ GONE
               └────abandon──────────────────────────────────────────▲

FILLING: reserved, the model writes it. READY: published, findable by its key. LEAVING: withdrawn, but a transfer
may still read it: the range is free only after `freed`. An entry is evicted least recently used first, and only
when nobody pins it (a request that will name it in its answer) and its hold is over (an answer named it: its
handle must stay readable until it is read, for a while at most).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from engines.ranges import Ranges, rounded

SETTLING_SECONDS = 1.0
"""How long a withdrawn range is counted on. A reader that stalls longer may be stopped; others are evicted instead."""


class State(Enum):
    FILLING = "filling"
    READY = "ready"
    LEAVING = "leaving"
    GONE = "gone"


TRANSITIONS = {
    State.FILLING: {State.READY, State.GONE},
    State.READY: {State.LEAVING},
    State.LEAVING: {State.GONE},
    State.GONE: frozenset[State](),
}


@dataclass(slots=True, eq=False)
class Entry:
    """One embedding. `value` is the owner's: what an answer says about it."""

    key: str
    offset: int
    nbytes: int
    state: State = State.FILLING
    pins: int = 0
    unread: int = 0  # answers that named it and whose readers have not come yet
    held_until: float = 0.0
    leaving_since: float = 0.0
    value: Any = field(default=None, repr=False)

    def move(self, to: State) -> None:
        if to not in TRANSITIONS[self.state]:
            raise ValueError(f"entry {self.key[:8]} cannot go from {self.state.value} to {to.value}")
        self.state = to

    def evictable(self, now: float) -> bool:
        return self.state is State.READY and not self.pins and self.held_until <= now


class EmbeddingCache:
    """The entries of one arena of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.ranges = Ranges(capacity)
        self._ready: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._filling: set[Entry] = set()
        self._leaving: set[Entry] = set()

    def find(self, key: str) -> Entry | None:
        """The READY entry of that key, which becomes the most recently used."""
        entry = self._ready.get(key)
        if entry is not None:
            self._ready.move_to_end(key)
        return entry

    def reserve(self, key: str, nbytes: int) -> Entry | None:
        """A FILLING entry; None when there is no room. Evicts nothing: see `evict`, `settling`."""
        offset = self.ranges.take(nbytes)
        if offset is None:
            return None
        entry = Entry(key, offset, nbytes)
        self._filling.add(entry)
        return entry

    def fits(self, nbytes: int) -> bool:
        """Whether an entry of that size could ever be reserved."""
        return rounded(nbytes) <= self.ranges.capacity

    def commit(self, entry: Entry, value: Any, held_until: float) -> None:
        """FILLING → READY. Raises ValueError if the key is READY already."""
        if entry.key in self._ready:
            raise ValueError(f"entry {entry.key[:8]} is cached already")
        entry.move(State.READY)
        entry.value, entry.held_until = value, max(entry.held_until, held_until)
        self._filling.remove(entry)
        self._ready[entry.key] = entry

    def abandon(self, entry: Entry) -> None:
        """FILLING → GONE: nobody writes it any more and nobody was told of it."""
        entry.move(State.GONE)
        self._filling.remove(entry)
        self.ranges.give_back(entry.offset)

    def pin(self, entry: Entry) -> bool:
        """Keep a READY entry until `unpin`. False: it is not READY any more."""
        if entry.state is not State.READY:
            return False
        entry.pins += 1
        self._ready.move_to_end(entry.key)
        return True

    def unpin(self, entry: Entry) -> None:
        """Undo one `pin`."""
        if entry.pins <= 0:
            raise ValueError(f"entry {entry.key[:8]} is not pinned")
        entry.pins -= 1

    def named(self, entry: Entry, held_until: float) -> None:
        """An answer named the entry, FILLING or READY, and holds it until it is read, or until then."""
        entry.unread += 1
        entry.held_until = max(entry.held_until, held_until)

    def not_named(self, entry: Entry) -> None:
        """Nobody will come for it, as it was brought where it is wanted: its hold ends unless an answer named it."""
        if not entry.unread:
            entry.held_until = 0.0

    def was_read(self, entry: Entry) -> None:
        """A reader got all of it; the last one that an answer promised it to ends the hold."""
        entry.unread = max(0, entry.unread - 1)
        if not entry.unread:
            entry.held_until = 0.0

    def evict(self, now: float) -> Entry | None:
        """READY → LEAVING for the least recently used entry that may go; None when none may.

        The caller withdraws it, and calls `freed` when no transfer can read it any more.
        """
        entry = next((entry for entry in self._ready.values() if entry.evictable(now)), None)
        if entry is None:
            return None
        entry.move(State.LEAVING)
        entry.leaving_since = now
        del self._ready[entry.key]
        self._leaving.add(entry)
        return entry

    def freed(self, entry: Entry) -> None:
        """LEAVING → GONE: the range may be reserved again."""
        entry.move(State.GONE)
        self._leaving.remove(entry)
        self.ranges.give_back(entry.offset)

    def settling(self, nbytes: int, now: float) -> bool:
        """Whether the entries that left a moment ago make enough room, so that waiting beats evicting more."""
        recent = [entry for entry in self._leaving if now - entry.leaving_since < SETTLING_SECONDS]
        return bool(recent) and self.ranges.would_fit(nbytes, (entry.offset for entry in recent))

    def info(self, now: float) -> dict[str, int]:
        """Sizes in bytes; `pinned`: entries that may not be evicted now."""
        entries = [*self._ready.values(), *self._filling, *self._leaving]
        return {
            "items": len(self._ready),
            "bytes": sum(entry.nbytes for entry in entries),
            "capacity": self.ranges.capacity,
            "pinned": sum(not entry.evictable(now) for entry in self._ready.values()),
            "filling": len(self._filling),
            "leaving": len(self._leaving),
        }

    def check(self) -> None:
        """Raises RuntimeError unless the entries and the holes cover the arena exactly once."""
        self.ranges.check()
        used = [*self._ready.values(), *self._filling, *self._leaving]
        spans = sorted((entry.offset, rounded(entry.nbytes)) for entry in used)
        if any(a + n > b for (a, n), (b, _) in pairwise(spans)):
            raise RuntimeError(f"embeddings overlap: {spans}")
        if sum(length for _, length in spans) + self.ranges.free != self.ranges.capacity:
            raise RuntimeError(f"{len(spans)} embeddings and {self.ranges.free} free bytes do not fill the arena")

    def __repr__(self) -> str:
        return (
            f"<EmbeddingCache {len(self._ready)} ready, {len(self._filling)} filling, {len(self._leaving)} leaving,"
            f" {self.ranges.free}/{self.ranges.capacity} bytes free>"
        )
