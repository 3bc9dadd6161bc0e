"""A simulated encoder: host processes prepare items, the GPU takes those that are ready in batches, a cache remembers.

Identical items in flight are encoded once. What leaves the encoder is told to the caller; nothing is sent from here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.simulator.caches import Cache
from bench.simulator.clock import Clock
from bench.simulator.models import Cost, Vision
from bench.simulator.requests import Media
from bench.simulator.stations import Station


@dataclass(frozen=True, slots=True)
class Encoder:
    """What an encoder is made of."""

    vision: Vision
    hosts: int = 1  # processes that prepare items
    batch: int = 8  # items at once on the GPU, which takes as long as one after the other
    cache_bytes: float = 4e9
    hit: float = 1e-3  # seconds that an item takes which is in the cache


class Encode:
    """A leg's items on their way through an encoder; `done(encode)` or `failed()` is called once."""

    __slots__ = ("begun", "busy", "cached", "done", "failed", "missing", "nbytes")

    def __init__(self, begun: float, missing: int, done: Callable[[Encode], None], failed: Callable[[], None]) -> None:
        self.begun = begun
        self.missing = missing
        self.done = done
        self.failed = failed
        self.cached: set[str] = set()  # identities that were here, or in work already
        self.nbytes = 0
        self.busy = 0.0  # seconds that its last item was worked on


class _Flight:
    """One item in work, for all who wait for it."""

    __slots__ = ("cost", "key", "legs")

    def __init__(self, key: str, cost: Cost, leg: Encode) -> None:
        self.key = key
        self.cost = cost
        self.legs = [leg]


class SimulatedEncoder:
    def __init__(self, clock: Clock, spec: Encoder) -> None:
        self._clock = clock
        self._spec = spec
        self._hosts = Station(clock, spec.hosts)
        self._ready: deque[_Flight] = deque()
        self._flights: dict[str, _Flight] = {}
        self._cache = Cache(spec.cache_bytes)
        self._computing = False
        self._life = 0
        self.legs: dict[Encode, None] = {}  # in the order in which they came
        self.alive = True
        self.slowness = 1.0  # times the model's seconds, of what begins from now on

    def __repr__(self) -> str:
        return f"<SimulatedEncoder {len(self.legs)} legs, {len(self._ready)} items ready, {self._cache}>"

    def holds(self, identity: str) -> bool:
        return identity in self._cache

    def encode(self, items: Sequence[Media], done: Callable[[Encode], None], failed: Callable[[], None]) -> None:
        leg = Encode(self._clock.now, len(items), done, failed)
        self.legs[leg] = None
        for media in items:
            cost = self._spec.vision.cost(media)
            leg.nbytes += cost.nbytes
            if self._cache.touch(media.identity):
                leg.cached.add(media.identity)
                self._clock.after(self._spec.hit * self.slowness, self._finished, leg, self._spec.hit, self._life)
            elif (flight := self._flights.get(media.identity)) is not None:
                leg.cached.add(media.identity)
                flight.legs.append(leg)
            else:
                flight = self._flights[media.identity] = _Flight(media.identity, cost, leg)
                self._hosts.serve(cost.host * self.slowness, self._prepared, flight)

    def kill(self) -> None:
        """All that is in work fails, and nothing is remembered."""
        self.alive = False
        self._life += 1
        self._hosts.clear()
        self._ready.clear()
        self._flights.clear()
        self._cache.clear()
        self._computing = False
        legs, self.legs = self.legs, {}
        for leg in legs:
            leg.failed()

    def restart(self) -> None:
        self.alive = True

    def _prepared(self, flight: _Flight) -> None:
        self._ready.append(flight)
        if not self._computing:
            self._compute()

    def _compute(self) -> None:
        if not self._ready:
            self._computing = False
            return
        self._computing = True
        batch = [self._ready.popleft() for _ in range(min(self._spec.batch, len(self._ready)))]
        seconds = sum(flight.cost.gpu for flight in batch) * self.slowness
        self._clock.after(seconds, self._computed, batch, seconds, self._life)

    def _computed(self, batch: list[_Flight], seconds: float, life: int) -> None:
        if life != self._life:
            return
        for flight in batch:
            del self._flights[flight.key]
            self._cache.put(flight.key, flight.cost.nbytes)
        self._compute()
        for flight in batch:
            for leg in flight.legs:
                self._finished(leg, flight.cost.host * self.slowness + seconds, life)

    def _finished(self, leg: Encode, busy: float, life: int) -> None:
        if life != self._life:
            return
        leg.missing -= 1
        if not leg.missing:
            leg.busy = busy
            del self.legs[leg]
            leg.done(leg)
