"""Who may take which leg now: the family that serves a request, its paths, and pools of instances. Nothing is charged.

Prefill and decode are of one family (`Instance.dialect`), and fed by encoders that it understands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from proxy.balancer.fleet import Fleet
from proxy.balancer.pool import Pool
from proxy.breaker import Breakers, Circuit
from proxy.core import Instance, Job, Path, Role, State
from proxy.errors import NoInstance, ProxyError
from proxy.planning.families import UNKNOWN, Families
from proxy.routing import paths, router

NOBODY: Collection[str] = frozenset()


class _View:
    """What planning finds out of the fleet again and again, between two changes of it."""

    __slots__ = ("encoding", "fitting", "listed", "routes", "version")

    def __init__(self, fleet: Fleet) -> None:
        self.version = fleet.version
        # Of all that prefill or decode.
        self.listed = {instance.dialect for instance in fleet if instance.role is not Role.ENCODE} - {UNKNOWN}
        self.encoding = {instance.dialect for instance in fleet if _encodes(instance)}
        # READY ones, by role, family, and whether they are to encode.
        self.fitting: dict[tuple[Role, str, bool], Pool] = {}
        self.routes: dict[tuple[str, int], router.Route] = {}  # by family and number of items


class Candidates:
    """Answers for one moment: `now` is what the breakers go by."""

    def __init__(self, fleet: Fleet, breakers: Breakers, inline: bool, families: Families) -> None:
        """`inline`: engines may encode where encoders fail."""
        self._fleet = fleet
        self._breakers = breakers
        self._inline = inline
        self._families = families
        self._view = _View(fleet)

    def pool(self, role: Role, now: float, tried: Collection[str], family: str, inline: bool = False) -> Pool:
        """Those with this role that may be given a leg of `family` now, but for `tried`. Perhaps empty.

        `inline`: with media as they are.
        """
        view = self._seen()
        key = role, family, inline
        ready = view.fitting.get(key)
        if ready is None:
            fitting = (i for i in self._fleet.ready(role) if self._fits(i, family))
            ready = view.fitting[key] = Pool(i for i in fitting if not inline or self.takes_media(i))
        if not tried and self._breakers.all_allowed(now):
            return ready
        return Pool(i for i in ready.by_url.values() if i.url not in tried and self._breakers.allows(i.url, now))

    def takes_media(self, instance: Instance) -> bool:
        """Whether media may be sent to it as they are: to those that say that they encode, where any of its family
        does."""
        return _encodes(instance) or instance.dialect not in self._seen().encoding

    def some(self, role: Role, now: float, tried: Collection[str], family: str, inline: bool = False) -> Pool:
        """The same. Raises NoInstance where there is nobody."""
        pool = self.pool(role, now, tried, family, inline)
        if not pool:
            raise NoInstance(f"no {role.label} engine is ready", retry_after=self.wait(now))
        return pool

    def family(self, job: Job, now: float, load: Callable[[str], int]) -> str:
        """The family that `job` goes to: the only one; else one that serves its model and is the least loaded."""
        listed = self._seen().listed
        if len(listed) < 2:
            return next(iter(listed), UNKNOWN)
        model = job.body.get("model")

        def rank(family: str) -> tuple[bool, bool, int, str]:
            answering = [i for i in self._fleet if i.dialect == family and Role.DECODE in i.role]
            return (
                not self._serves(job, now, family),
                all(i.model != model for i in answering),
                min((load(i.url) for i in answering if i.state is State.READY), default=0),
                family,
            )

        return min(listed, key=rank)

    def route(
        self, job: Job, now: float, tried: Collection[str], family: str, done: Role | None = None
    ) -> router.Route:
        """Raises BadRequest, NoInstance. `done`: a role whose legs are served already, whoever is up now."""
        if tried or done is not None or not self._breakers.all_allowed(now):
            return self._found_route(job, now, tried, family, done)
        routes, key = self._seen().routes, (family, len(job.items))
        route = routes.get(key)
        if route is None:
            route = routes[key] = self._found_route(job, now, tried, family, done)
        return route

    def wait(self, now: float) -> float | None:
        """Seconds until the first instance that is kept from work may be tried again; None if none is."""
        waits = [self._breakers.wait(i.url, now) for i in self._fleet if i.state is State.READY]
        return min((wait for wait in waits if wait > 0), default=None)

    def _seen(self) -> _View:
        fleet, view = self._fleet, self._view
        fleet.refresh()
        if view.version != fleet.version:
            view = self._view = _View(fleet)
        return view

    def _fits(self, instance: Instance, family: str) -> bool:
        return self._families.fit(instance, family, self._seen().listed)

    def _serves(self, job: Job, now: float, family: str) -> bool:
        try:
            self.route(job, now, NOBODY, family)
        except ProxyError:
            return False
        return True

    def _found_route(
        self, job: Job, now: float, tried: Collection[str], family: str, done: Role | None
    ) -> router.Route:
        census = self._census(now, tried, family)
        if done is not None and job.items:
            census[done] = Counter({State.READY: 1})
        param = job.items[0].param if job.items else None
        try:
            route = router.route(len(job.items), census, param, self._inlines(family, census))
        except NoInstance as error:
            error.retry_after = self.wait(now)
            raise
        return self._told(route, family)

    def _told(self, route: router.Route, family: str) -> router.Route:
        """With a reason that knows of encoders which only the engines themselves call."""
        if route.path not in paths.INLINE:
            return route
        own = [i for i in self._fleet if i.role is Role.ENCODE and i.dialect == family]
        if not own or any(self._fits(i, family) for i in own):
            return route
        return replace(route, reason=f"{route.reason.partition(',')[0]}, the engine calls the encoders")

    def _inlines(self, family: str, census: router.Census) -> tuple[Path, ...]:
        if family not in self._families.inline:
            alone = family in self._seen().encoding and Role.ENCODE not in census
            return (Path.EPD,) if self._inline or alone else ()
        return paths.INLINE if self._inline or Role.ENCODE not in census else ()

    def _census(self, now: float, tried: Collection[str], family: str) -> dict[Role, Counter[str]]:
        """How many instances of each role are in each state, or kept from work by their circuit."""
        counted: dict[Role, Counter[str]] = {}
        for instance in self._fleet:
            if UNKNOWN in (family, instance.dialect) or self._fits(instance, family):
                counted.setdefault(instance.role, Counter())[self._state(instance, now, tried)] += 1
        return counted

    def _state(self, instance: Instance, now: float, tried: Collection[str]) -> str:
        if instance.state is not State.READY:
            return instance.state
        if instance.url in tried:
            return "TRIED"
        if self._breakers.allows(instance.url, now):
            return State.READY
        return "BUSY" if self._breakers.circuit(instance.url, now) is Circuit.CLOSED else "OPEN"


def _encodes(instance: Instance) -> bool:
    """Whether this one says that it has an encoder of its own."""
    return bool(instance.facts.get("encodes"))
