"""The instances and their lives. One table says how states move; no probe is sent and no clock read here.

JOINING ──HEALTHY──▶ READY ──FAILED──▶ DOWN ──HEALTHY──▶ READY
any but GONE ──DRAIN──▶ DRAINING ──IDLE──▶ GONE        JOIN makes DRAINING and DOWN JOINING again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any

from proxy.core import Instance, Role, State, Switch


class Event(StrEnum):
    HEALTHY = "HEALTHY"  # a probe was answered as a member of its role should
    FAILED = "FAILED"  # enough probes in a row were not
    DRAIN = "DRAIN"  # no new legs, please
    IDLE = "IDLE"  # the last lease was returned
    JOIN = "JOIN"  # registered again


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.JOINING: {  # until it has been healthy once, a failed probe means that it is still starting
        Event.HEALTHY: State.READY,
        Event.DRAIN: State.DRAINING,
        Event.JOIN: State.JOINING,
    },
    State.READY: {
        Event.HEALTHY: State.READY,
        Event.FAILED: State.DOWN,
        Event.DRAIN: State.DRAINING,
        Event.JOIN: State.READY,
    },
    State.DOWN: {
        Event.HEALTHY: State.READY,
        Event.FAILED: State.DOWN,
        Event.DRAIN: State.DRAINING,
        Event.JOIN: State.JOINING,
    },
    State.DRAINING: {
        Event.HEALTHY: State.DRAINING,
        Event.FAILED: State.DRAINING,
        Event.DRAIN: State.DRAINING,
        Event.IDLE: State.GONE,
        Event.JOIN: State.JOINING,
    },
    State.GONE: {},
}


class IllegalTransition(RuntimeError):
    """An event that the instance's state does not know: a mistake in this program."""


class Fleet:
    """Every instance by its URL, which is unique: an engine has one role."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self.held: dict[str, frozenset[str]] = {}  # URLs kept out although these sources list them
        self.version = 0  # another number each time an instance comes, goes, or is not as it was

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances.values()))

    def __repr__(self) -> str:
        return "<Fleet " + ", ".join(f"{i.role.label} {i.netloc} {i.state}" for i in self) + ">"

    def get(self, url: str) -> Instance | None:
        return self._instances.get(url)

    def join(self, url: str, role: Role, dialect: str, facts: Mapping[str, Any] | None = None) -> Instance:
        """Add an instance, or bring one back that was draining; to no other role then. Raises ValueError if it is known
        with another role."""
        known = self._instances.get(url)
        if known is None:
            known = self._instances[url] = Instance(url, role, dialect, facts=facts or {})
            self.version += 1
        elif role not in (known.role, known.listed):
            raise ValueError(f"{url} is already known as {known.role.label}")
        else:
            known.switch = None
            self.apply(known, Event.JOIN, known.reason)
        return known

    def remove(self, url: str) -> Instance | None:
        """Forget an instance at once: legs that run there go on, none begins. None if it is unknown."""
        instance = self._instances.get(url)
        if instance is not None:
            self.apply(instance, Event.DRAIN, "removed")
            self.apply(instance, Event.IDLE, "removed")
        return instance

    def apply(self, instance: Instance, event: Event, reason: str) -> bool:
        """Move `instance` by the table; True if its state changed. A GONE one leaves the fleet.

        Raises IllegalTransition, with nothing changed.
        """
        state = TRANSITIONS[instance.state].get(event)
        if state is None:
            raise IllegalTransition(f"{event} means nothing to {instance.url}, which is {instance.state}")
        changed = state is not instance.state
        self.version += changed
        instance.state, instance.reason = state, reason
        if state is State.GONE:
            self._instances.pop(instance.url, None)
        return changed

    def begin(self, instance: Instance, switch: Switch, reason: str) -> None:
        """Drain `instance` for another role. It leaves not, however idle it is: `rejoin` ends this."""
        with self.changing():
            instance.switch = switch
            self.apply(instance, Event.DRAIN, reason)

    def rejoin(self, instance: Instance, reason: str) -> None:
        """Its switch is over, in whichever role: it joins again, or may leave if nobody lists it any more."""
        with self.changing():
            instance.switch = None
            if instance.sources:
                self.apply(instance, Event.JOIN, reason)

    def changing(self) -> AbstractContextManager[None]:
        """What is changed within is changed at once for all workers, from what they have changed before. No await."""
        return nullcontext()

    def refresh(self) -> bool:
        """Take over what other workers changed; True if they did."""
        return False

    def ready(self, role: Role) -> list[Instance]:
        """Those that may be given a leg of exactly this role."""
        return [i for i in self._instances.values() if i.role == role and i.state is State.READY]

    def census(self) -> dict[Role, Counter[State]]:
        """How many instances of each role are in each state; roles nobody has are absent."""
        counted: dict[Role, Counter[State]] = {}
        for instance in self._instances.values():
            counted.setdefault(instance.role, Counter())[instance.state] += 1
        return counted
