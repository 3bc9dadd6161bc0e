"""The fleet as all workers of one proxy see it: a Fleet whose instances stand in shared memory, written by any of them.

    0           version     how often the fleet was written; its lowest bit says which half holds it now
    64          half 0      length 8 │ crc32 8 │ JSON: [facts by URL, held by URL]
    64 + 2 M    half 1      length 8 │ crc32 8 │ JSON …

A change is made under `lock`: read what others wrote, change, write the other half, and only then the version, in one
8-byte store. Whoever is killed on the way leaves the old fleet standing. Reading takes no lock: a half that is written
over while it is read does not have its checksum, and is read again.

Every look at the fleet begins by comparing one number, so that an instance added, drained, found dead or removed by
one worker is so for the next request of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import orjson

from proxy.balancer.fleet import Event, Fleet
from proxy.core import Instance, Role, State, Switch

_HALVES = 64
_HALF = 1 << 21  # 1,200 instances with 300 letters of reason and 1,000 of facts each
_HEAD = 16
SIZE = _HALVES + 2 * _HALF
_REASON_LIMIT = 300


@dataclass(frozen=True, slots=True)
class Facts:
    """What of an instance is every worker's."""

    role: int
    dialect: str
    state: str
    reason: str
    model: str
    facts: Mapping[str, Any]
    secret: str | None
    weight: float
    sources: list[str]  # in order
    listed_as: int | None
    switch: list[float] | None  # its role and when it is to be over

    @classmethod
    def of(cls, instance: Instance) -> Facts:
        reason = instance.reason[:_REASON_LIMIT]
        role, dialect, state = instance.role.value, instance.dialect, instance.state
        said = instance.model, instance.facts, instance.secret, instance.weight, sorted(instance.sources)
        listed_as = None if instance.listed_as is None else instance.listed_as.value
        switch = None if instance.switch is None else [instance.switch.role.value, instance.switch.until]
        return cls(role, dialect, state, reason, *said, listed_as, switch)


class Roster(Fleet):
    """Instances keep their identity while they are in the fleet. Facts that this worker has set on one and nobody has
    overwritten are published with the next event."""

    def __init__(
        self,
        buffer: bytearray | memoryview,
        lock: Callable[[], AbstractContextManager[object]] = nullcontext,
        told: Callable[[Instance, State], None] = lambda instance, before: None,
    ) -> None:
        """`told` hears of every instance whose state another worker changed, with its state before."""
        super().__init__()
        self._bytes = memoryview(buffer)[:SIZE].cast("B")
        self._version = self._bytes[:8].cast("q")
        self._lock = lock
        self._told = told
        self.takeovers = 0  # how often something was found that another worker wrote
        self._seen = 0
        self._facts: dict[str, Facts] = {}  # as they stand in the memory
        self._held: dict[str, list[str]] = {}  # the same of `held`
        self._changing = False

    # ---- looking

    def __iter__(self) -> Iterator[Instance]:
        self.refresh()
        return super().__iter__()

    def get(self, url: str) -> Instance | None:
        self.refresh()
        return super().get(url)

    def ready(self, role: Role) -> list[Instance]:
        self.refresh()
        return super().ready(role)

    def census(self) -> dict[Role, Counter[State]]:
        self.refresh()
        return super().census()

    # ---- changing

    def join(self, url: str, role: Role, dialect: str, facts: Mapping[str, Any] | None = None) -> Instance:
        with self.changing():
            return super().join(url, role, dialect, facts)

    def remove(self, url: str) -> Instance | None:
        with self.changing():
            return super().remove(url)

    def apply(self, instance: Instance, event: Event, reason: str) -> bool:
        with self.changing():
            if self._instances.get(instance.url) is not instance:
                return False  # removed by another worker a moment ago
            return super().apply(instance, event, reason)

    def share(self) -> None:
        """Publish what was set on instances here without an event, such as why one is not READY yet."""
        if {url: Facts.of(instance) for url, instance in self._instances.items()} != self._facts:
            with self.changing():
                pass

    @contextmanager
    def changing(self) -> Iterator[None]:
        if self._changing:
            yield
            return
        with self._lock():
            self.refresh()
            self._changing = True
            try:
                yield
                self._publish()
            finally:
                self._changing = False

    # ---- the memory

    def refresh(self) -> bool:
        if self._changing or self._version[0] == self._seen:
            return False
        while True:
            version = self._version[0]
            if (read := self._read(version)) is not None and version == self._version[0]:
                break
        listed, self._held = read
        self._seen = version
        self.version += 1
        for url in self._facts.keys() - listed.keys():
            self._leave(url)
        for url, facts in listed.items():
            self._take_over(url, facts)
        self._facts = listed
        self.held = {url: frozenset(sources) for url, sources in self._held.items()}
        self.takeovers += 1
        return True

    def _read(self, version: int) -> tuple[dict[str, Facts], dict[str, list[str]]] | None:
        start = _HALVES + version % 2 * _HALF
        head = self._bytes[start : start + _HEAD].cast("q")
        length, checksum = head
        text = bytes(self._bytes[start + _HEAD : start + _HEAD + length])
        if crc32(text) != checksum:
            return None
        listed, held = orjson.loads(text)
        return {url: Facts(*facts) for url, facts in listed.items()}, held

    def _publish(self) -> None:
        facts = {url: Facts.of(instance) for url, instance in self._instances.items()}
        held = {url: sorted(sources) for url, sources in self.held.items()}
        if facts == self._facts and held == self._held:
            return
        listed = {url: [getattr(f, name) for name in Facts.__slots__] for url, f in facts.items()}
        text = orjson.dumps([listed, held])
        if len(text) > _HALF - _HEAD:
            self._undo(facts.keys() - self._facts.keys())
            raise ValueError(f"{len(facts)} instances are more than one proxy holds")
        start = _HALVES + (self._seen + 1) % 2 * _HALF
        head = self._bytes[start : start + _HEAD].cast("q")
        self._bytes[start + _HEAD : start + _HEAD + len(text)] = text
        head[0], head[1] = len(text), crc32(text)
        self._seen = self._version[0] = self._seen + 1
        self._facts, self._held = facts, held

    def _take_over(self, url: str, facts: Facts) -> None:
        """What another worker changed, and only that: the rest may have been set here a moment ago."""
        instance = self._instances.get(url)
        if instance is None:
            instance = self._instances[url] = Instance(url, Role(facts.role), facts.dialect)
        seen = self._facts.get(url)
        if seen is None or facts.role != seen.role:
            instance.role = Role(facts.role)
        if seen is None or facts.listed_as != seen.listed_as:
            instance.listed_as = None if facts.listed_as is None else Role(facts.listed_as)
        if seen is None or facts.switch != seen.switch:
            instance.switch = None if facts.switch is None else Switch(Role(int(facts.switch[0])), facts.switch[1])
        if seen is None or facts.dialect != seen.dialect:
            instance.dialect = facts.dialect
        if seen is None or (facts.state, facts.reason) != (seen.state, seen.reason):
            before, instance.state, instance.reason = instance.state, State(facts.state), facts.reason
            if instance.state is not before:
                self._told(instance, before)
        if seen is None or facts.model != seen.model:
            instance.model = facts.model
        if seen is None or facts.facts != seen.facts:
            instance.facts = facts.facts
        if seen is None or facts.secret != seen.secret:
            instance.secret = facts.secret
        if seen is None or facts.weight != seen.weight:
            instance.weight = facts.weight
        if seen is None or facts.sources != seen.sources:
            instance.sources = frozenset(facts.sources)

    def _leave(self, url: str) -> None:
        instance = self._instances.pop(url, None)
        if instance is not None:
            before, instance.state, instance.reason = instance.state, State.GONE, "removed"
            self._told(instance, before)

    def _undo(self, urls: Set[str]) -> None:
        for url in urls:
            self._instances.pop(url)
        self.version += 1
