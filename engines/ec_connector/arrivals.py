"""Which request waits for which embedding, and which embeddings lie on the shelf. It moves no bytes and has no clock.

    ORDERED ──▶ HERE      the worker can load it; kept for later requests while there is room
       └──────▶ FAILED    whoever can encode does so, the others fail; the next request orders anew

Everything here runs on vLLM's scheduler thread. A file may go only when no step in flight still reads it: hence an
embedding that nobody wants any more stays for `SETTLED` passes of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

SETTLED = 64
"""Far more passes than vLLM has steps in flight at a time: 2, or one per pipeline stage."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One item of a request.

    tokens: embeddings of it.   entry: what the request's ec_transfer_params say of it.
    encodable: the request brought the media itself, so that it can do without.
    """

    key: str
    tokens: int
    entry: Mapping[str, Any] = field(default_factory=dict)
    encodable: bool = False

    @property
    def announced(self) -> bool:
        """Somebody encodes it elsewhere: the request says so, or has no media to encode."""
        return bool(self.entry) or not self.encodable


class Deliveries(Protocol):
    """Brings embeddings to the shelf. What it reports comes back through `Arrivals.arrived`."""

    def order(self, wanted: Wanted) -> None: ...
    def cancel(self, key: str) -> None: ...
    def discard(self, key: str) -> None:
        """Remove it from the shelf; unknown keys are ignored."""


class State(Enum):
    ORDERED = "ordered"
    HERE = "here"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Parcel:
    key: str
    state: State = State.ORDERED
    nbytes: int = 0
    wanted_by: set[str] = field(default_factory=set)
    idle_since: int = 0  # the pass in which the last one that wanted it ended


class Arrivals:
    """`capacity`: bytes of embeddings to keep for later requests."""

    def __init__(self, deliveries: Deliveries, capacity: int) -> None:
        self._deliveries = deliveries
        self._capacity = capacity
        self._parcels: dict[str, Parcel] = {}  # least recently wanted first
        self._wants: dict[str, set[str]] = {}
        self._lost: set[str] = set()
        self._bytes = 0
        self._pass = 0

    def __repr__(self) -> str:
        count = {state: sum(parcel.state is state for parcel in self._parcels.values()) for state in State}
        return f"<Arrivals {' '.join(f'{n} {state.value}' for state, n in count.items())}, {len(self._wants)} requests>"

    def __contains__(self, key: str) -> bool:
        """Whether it can be loaded now."""
        parcel = self._parcels.get(key)
        return parcel is not None and parcel.state is State.HERE

    def ready(self, request: str, wanted: Iterable[Wanted]) -> bool:
        """Whether the request can be scheduled. What is announced and not here yet is ordered.

        False for ever once an embedding that it cannot do without has failed: see `take_lost`.
        """
        states = [self._ready(request, item) for item in wanted]  # all of them: each one is ordered now
        return all(states)

    def _ready(self, request: str, item: Wanted) -> bool:
        parcel = self._parcels.get(item.key)
        if parcel is None and not item.announced:
            return True
        if parcel is None or (parcel.state is State.FAILED and request not in parcel.wanted_by):
            parcel = self._order(item)
        self._claim(request, parcel)
        if parcel.state is State.FAILED and not item.encodable:
            self._lost.add(request)
        return parcel.state is State.HERE or (parcel.state is State.FAILED and item.encodable)

    def _order(self, item: Wanted) -> Parcel:
        before = self._parcels.get(item.key)
        parcel = Parcel(item.key, wanted_by=set() if before is None else before.wanted_by)
        self._parcels[item.key] = parcel
        self._deliveries.order(item)
        return parcel

    def _claim(self, request: str, parcel: Parcel) -> None:
        if request not in parcel.wanted_by:
            parcel.wanted_by.add(request)
            self._wants.setdefault(request, set()).add(parcel.key)
            self._parcels[parcel.key] = self._parcels.pop(parcel.key)

    def arrived(self, key: str, nbytes: int) -> None:
        """It lies on the shelf."""
        parcel = self._parcels.get(key)
        if parcel is None:
            self._deliveries.discard(key)  # everybody left while it came
        elif parcel.state is State.ORDERED:
            parcel.state, parcel.nbytes = State.HERE, nbytes
            self._bytes += nbytes

    def failed(self, key: str) -> None:
        """It will not come."""
        parcel = self._parcels.get(key)
        if parcel is not None and parcel.state is State.ORDERED:
            parcel.state = State.FAILED

    def take_lost(self) -> set[str]:
        """Requests that can never be scheduled; each is named once."""
        lost, self._lost = self._lost, set()
        return lost

    def finished(self, request: str) -> None:
        """It ended, however it did. Unknown requests are ignored."""
        self._lost.discard(request)
        for key in self._wants.pop(request, ()):
            parcel = self._parcels[key]
            parcel.wanted_by.discard(request)
            parcel.idle_since = self._pass
            if not parcel.wanted_by and parcel.state is not State.HERE:
                self._deliveries.cancel(key)
                del self._parcels[key]

    def tick(self) -> None:
        """Once for each pass of the scheduler, after its decisions: drop what is beyond the capacity."""
        self._pass += 1
        if self._bytes <= self._capacity:
            return
        for parcel in list(self._parcels.values()):
            idle = not parcel.wanted_by and self._pass - parcel.idle_since > SETTLED
            if idle and self._bytes > self._capacity:
                del self._parcels[parcel.key]
                self._deliveries.discard(parcel.key)
                self._bytes -= parcel.nbytes
