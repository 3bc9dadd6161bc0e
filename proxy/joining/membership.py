"""Who is listed by which source, and what follows from a change. Pure: sources are read elsewhere, time is passed in.

    configured        the lists of flags and YAML
    registered        POST /instances: for ever, or until its heartbeats stop
    dns+http://… etc. a name among the lists, behind which there are some now

An instance joins the fleet with the first source that lists it, and is drained when the last one does so no more. Whom
an admin drains or removes is held: it stays away although sources list it, until it is registered again or they have
all dropped it. All of that stands in the fleet, so that any worker may go on where another one has died.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from proxy.balancer.fleet import Event, Fleet
from proxy.core import Instance, Role, State
from proxy.joining.heartbeats import Heartbeats
from proxy.settings.endpoint import Endpoint

log = logging.getLogger(__name__)

CONFIGURED = "configured"
REGISTERED = "registered"

Listed: TypeAlias = tuple[Role, Endpoint]


class Membership:
    """What each source said last stands with the instances (`sources`) and with those who are held."""

    def __init__(
        self, fleet: Fleet, heartbeats: Heartbeats, forget: Callable[[Instance], None] = lambda instance: None
    ) -> None:
        """`forget` hears of an instance that left at once."""
        self._fleet = fleet
        self._heartbeats = heartbeats
        self._forget = forget
        self._strange: set[tuple[str, str]] = set()  # sources and the URLs that they list wrongly: told once
        self.finders: Mapping[str, Listed] = {}  # names behind which there are engines, by source

    def __repr__(self) -> str:
        return f"<Membership {self._fleet!r}, {len(self._fleet.held)} held>"

    # ---- flags and YAML

    def follow(self, listed: Iterable[Listed]) -> None:
        """The names among `listed` are sources from now on."""
        self.finders = {endpoint.name: (role, endpoint) for role, endpoint in listed if endpoint.finder}

    def configure(self, listed: Sequence[Listed]) -> bool:
        """This is what flags and YAML list from now on; True if the fleet has changed."""
        self.follow(listed)
        with self._fleet.changing():
            changed = self._list(CONFIGURED, [one for one in listed if not one[1].finder])
            for source in self._sources() - {CONFIGURED, REGISTERED} - self.finders.keys():
                changed |= self._list(source, ())
        return changed

    def found(self, source: str, netlocs: Iterable[str]) -> bool:
        """These are behind a name now, as host:port; True if the fleet has changed."""
        if source not in self.finders:
            return False  # it was taken off the lists meanwhile
        role, endpoint = self.finders[source]
        with self._fleet.changing():
            return self._list(source, [(role, endpoint.at(netloc)) for netloc in netlocs])

    def _sources(self) -> set[str]:
        return set().union(*(i.sources for i in self._fleet), *self._fleet.held.values())

    def _listed_by(self, source: str) -> set[str]:
        held = {url for url, sources in self._fleet.held.items() if source in sources}
        return held.union(instance.url for instance in self._fleet if source in instance.sources)

    def _list(self, source: str, listed: Sequence[Listed]) -> bool:
        wanted = {endpoint.url: (role, endpoint) for role, endpoint in listed}
        before = self._listed_by(source)
        left = [self._drop(source, url, f"no longer listed by {source}") for url in before - wanted.keys()]
        return any([*left, *(self._add(source, role, endpoint) for role, endpoint in wanted.values())])

    def _add(self, source: str, role: Role, endpoint: Endpoint) -> bool:
        """True if it is not as it was."""
        fleet, url = self._fleet, endpoint.url
        if (by := fleet.held.get(url)) is not None:
            fleet.held[url] = by | {source}
            if (held := fleet.get(url)) is not None:
                held.sources |= {source}
            return False
        known = fleet.get(url)
        if known is not None and source == CONFIGURED:
            if known.listed != role or endpoint.dialect not in ("auto", known.dialect):
                self._leave(known)  # another engine in its place
                known = None
        elif known is not None and known.listed != role:
            self._conflict(source, known, role)
            return False
        if comes := known is None or (known.state is State.DRAINING and not known.sources):
            known = fleet.join(url, role, endpoint.dialect, endpoint.facts)
            log.info("%s %s (%s): listed by %s", role.label, url, endpoint.dialect, source)
        known.sources |= {source}
        if source != CONFIGURED and known.sources != {source}:
            return comes  # what flags, files or people say of it comes first
        unplaced = {name: value for name, value in known.facts.items() if name != "labels"}
        return self._tell(known, {**unplaced, **endpoint.facts}, endpoint.secret, endpoint.weight or 1.0) or comes

    def _tell(self, instance: Instance, facts: Mapping[str, Any], secret: str | None, weight: float) -> bool:
        """What is said of an instance; True if something else was said before."""
        changed = (facts, secret, weight) != (instance.facts, instance.secret, instance.weight)
        if changed:
            self._fleet.version += 1
            instance.facts, instance.secret, instance.weight = facts, secret, weight
        return changed

    def _conflict(self, source: str, known: Instance, role: Role) -> None:
        if (source, known.url) not in self._strange:
            self._strange.add((source, known.url))
            log.warning("%s lists %s as %s, but it is %s", source, known.url, role.label, known.listed.label)

    def _drop(self, source: str, url: str, reason: str) -> bool:
        """True if nobody lists it any more."""
        fleet = self._fleet
        if url in fleet.held:
            fleet.held[url] -= {source}
            if not fleet.held[url]:
                del fleet.held[url]
        instance = fleet.get(url)
        if instance is None or source not in instance.sources:
            return False
        instance.sources -= {source}
        if instance.sources:
            return False
        log.info("%s %s is drained: %s", instance.role.label, url, reason)
        fleet.apply(instance, Event.DRAIN, reason)
        return True

    # ---- by HTTP

    def register(self, role: Role, endpoint: Endpoint, life: str, until: float | None) -> Instance | None:
        """It is alive `until` then, or for ever (None): it joins, and a drain or hold is over, but for a heartbeat of a
        process (`life`) that is known already. None if that is held and idle. Raises ValueError, LookupError."""
        fleet, beats, url = self._fleet, self._heartbeats, endpoint.url
        known = fleet.get(url)
        listed = (known.sources if known is not None else frozenset()) | fleet.held.get(url, frozenset())
        if until is not None and REGISTERED in listed and beats.knows(url, life):
            beats.beat(url, life, until)
            if known is not None:
                self._turned(known, role)
            return known
        with fleet.changing():
            instance = fleet.join(url, role, endpoint.dialect, endpoint.facts)
            instance.sources |= fleet.held.pop(url, frozenset()) | {REGISTERED}
            facts = {**instance.facts, **endpoint.facts}
            self._tell(instance, facts, endpoint.secret or instance.secret, endpoint.weight or instance.weight)
        if until is None:
            beats.forget(url)
        else:
            beats.beat(url, life, until)
            self._turned(instance, role)
        return instance

    def _turned(self, instance: Instance, role: Role) -> None:
        """An engine says that its role is `role`: under another one it gets nothing more, and is asked who it is."""
        if instance.role != role and instance.state is State.READY:
            self._fleet.apply(instance, Event.FAILED, f"it says that it is {role.label} now")

    def expire(self, now: float) -> bool:
        """Those are listed no more whose heartbeats have stopped; True if there were any."""
        fleet = self._fleet
        if not self._heartbeats.late(now):
            return False
        late = [
            url
            for url in self._listed_by(REGISTERED)
            if (until := self._heartbeats.until(url)) is not None and until <= now
        ]
        with fleet.changing():
            for url in late:
                self._drop(REGISTERED, url, "its heartbeats have stopped")
                self._heartbeats.forget(url)
        return bool(late)

    def excuse(self, seconds: float) -> None:
        """For so long, nobody has listened to heartbeats."""
        self._heartbeats.excuse(seconds)

    def drain(self, instance: Instance, reason: str) -> None:
        """Nothing new goes there, whoever lists it."""
        with self._fleet.changing():
            self._hold(instance)
            self._fleet.apply(instance, Event.DRAIN, reason)

    def remove(self, url: str) -> Instance | None:
        """It is forgotten now, whoever lists it; what runs there goes on. None if it is unknown."""
        with self._fleet.changing():
            instance = self._fleet.get(url)
            if instance is not None:
                self._hold(instance)
                self._leave(instance)
        return instance

    def _hold(self, instance: Instance) -> None:
        instance.switch = None
        if instance.sources:
            self._fleet.held[instance.url] = instance.sources

    def _leave(self, instance: Instance) -> None:
        self._fleet.remove(instance.url)
        self._forget(instance)
