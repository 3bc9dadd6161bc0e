"""A request's plan: route it, choose an instance for every leg, charge them. Synchronous; nothing is sent here.

A plan is drawn whole, and mended leg by leg: `redraw` and `encoder` choose again without the instances that failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Lease
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.breaker import Breakers, Circuit, Permit
from proxy.core import BOTH, Instance, Item, Job, Leg, Path, Plan, Role, State
from proxy.errors import NoInstance, ProxyError
from proxy.families import UNKNOWN, Families
from proxy.retry import rule
from proxy.routing import paths, router

NOBODY: Collection[str] = frozenset()
_INLINE = "encoders failed, encoding inline"

ALIKE = Families()


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


@dataclass(slots=True)
class Held:
    """A leg's leases and its permit."""

    leases: list[Lease]
    permit: Permit

    def succeeded(self) -> None:
        self.permit.succeeded()

    def failed(self, error: Exception, now: float) -> bool:
        if not isinstance(error, ProxyError):
            return False
        return self.permit.failed(rule(error).blame, now, error.retry_after)

    def close(self) -> None:
        self.permit.close()
        for lease in self.leases:
            lease.close()


class Holds:
    """All that one request keeps from others: leases and permits. Closed at its end, whatever happened."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: list[Closable] = []

    def add(self, held: C) -> C:
        self._held.append(held)
        return held

    def close(self) -> None:
        for held in self._held:
            held.close()

    def __enter__(self) -> Holds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _View:
    """What planning finds out of the fleet again and again, between two changes of it."""

    __slots__ = ("fitting", "listed", "routes", "version")

    def __init__(self, fleet: Fleet) -> None:
        self.version = fleet.version
        # Of all that prefill or decode.
        self.listed = {instance.dialect for instance in fleet if instance.role is not Role.ENCODE} - {UNKNOWN}
        self.fitting: dict[tuple[Role, str], Pool] = {}  # READY ones, by role and family
        self.routes: dict[tuple[str, int], router.Route] = {}  # by family and number of items


class Planner:
    """Draws plans on one fleet with one balancer. Every leg's hold is added to the Holds that it is given.

    Prefill and decode are of one family (`Instance.dialect`), and fed by encoders that it understands.
    """

    def __init__(
        self,
        fleet: Fleet,
        balancer: Balancer,
        breakers: Breakers,
        inline: bool = False,
        families: Families = ALIKE,
    ) -> None:
        """`inline`: engines may encode where encoders fail."""
        self._fleet = fleet
        self._balancer = balancer
        self.breakers = breakers
        self._inline = inline
        self._families = families
        self._view = _View(fleet)

    def draw(self, job: Job, now: float, holds: Holds) -> Plan:
        """The plan for `job` on the instances that may be used now. Raises BadRequest or NoInstance."""
        family = self._family(job, now)
        route = self._route(job, now, NOBODY, family)
        encodes = self._encodes(job, now, family, holds) if route.path.encodes else []
        generation = self._generation(route.path, job, now, NOBODY, family, holds)
        return Plan(route.path, self._reason(route, family), (*encodes, *generation))

    def _reason(self, route: router.Route, family: str) -> str:
        """The route's, which knows no encoders that only the engines themselves call."""
        if route.path not in paths.INLINE:
            return route.reason
        own = [i for i in self._fleet if i.role is Role.ENCODE and i.dialect == family]
        if not own or any(self._families.fit(i, family) for i in own):
            return route.reason
        return f"{route.reason.partition(',')[0]}, the engine calls the encoders"

    def redraw(self, plan: Plan, job: Job, now: float, tried: Collection[str], holds: Holds) -> Plan | None:
        """`plan` with prefill and decode anywhere but at `tried`, perhaps combined; None if nobody else can."""
        for leg in plan.legs:
            if leg.role is not Role.ENCODE:
                _close(leg)
        try:
            family, path = family_of(plan), plan.path
            if path not in paths.INLINE:
                path = self._route(job, now, tried, family, Role.ENCODE).path
            legs = self._generation(path, job, now, tried, family, holds)
        except NoInstance:
            return None
        return Plan(path, plan.reason, (*plan.encodes, *legs))

    def encode_again(self, plan: Plan, job: Job, now: float, holds: Holds) -> Plan:
        """`plan` with its encode legs drawn anew. Raises NoInstance."""
        others = [leg for leg in plan.legs if leg.role is not Role.ENCODE]
        for leg in plan.encodes:
            _close(leg)
        return replace(plan, legs=(*self._encodes(job, now, family_of(plan), holds), *others))

    def inline(self, plan: Plan, job: Job, now: float, holds: Holds) -> Plan | None:
        """`plan` at engines that get the media themselves; None if this deployment has none, or it must not."""
        family = family_of(plan)
        if not self.can_inline(plan, now):
            return None
        if family in self._families.inline:
            path = Path.EPD if plan.path.combined else Path.EP_D
            return replace(plan, path=path, reason=_INLINE)
        for leg in plan.legs:
            if leg.role not in (Role.ENCODE, BOTH):
                _close(leg)
        kept = [leg for leg in plan.legs if leg.role == BOTH]
        legs = kept or self._generation(Path.EPD, job, now, NOBODY, family, holds)
        return Plan(Path.EPD, _INLINE, (*plan.encodes, *legs))

    def can_inline(self, plan: Plan, now: float) -> bool:
        """Whether `inline` would find somebody."""
        family = family_of(plan)
        return self._inline and (family in self._families.inline or bool(self._usable(BOTH, now, NOBODY, family)))

    def encoder(
        self, items: Sequence[Item], now: float, tried: Collection[str], family: str, holds: Holds
    ) -> Leg | None:
        """One leg for all of `items` anywhere but at `tried`; None if there is nobody else."""
        candidates = self._usable(Role.ENCODE, now, tried, family)
        if not candidates:
            return None
        demand = Demand(max(1, sum(item.tokens for item in items)))
        lease = self._balancer.take(Role.ENCODE, candidates, demand)
        return self._leg(Role.ENCODE, lease.instance, [lease], holds, tuple(items))

    def wait(self, now: float) -> float | None:
        """Seconds until the first instance that is kept from work may be tried again; None if none is."""
        waits = [self.breakers.wait(i.url, now) for i in self._fleet if i.state is State.READY]
        return min((wait for wait in waits if wait > 0), default=None)

    # ---- one role

    def _encodes(self, job: Job, now: float, family: str, holds: Holds) -> list[Leg]:
        """One leg per chosen encoder. An item that occurs twice is sent once; the largest items choose first."""
        candidates = self._usable(Role.ENCODE, now, NOBODY, family)
        if not candidates:
            raise NoInstance("no encode engine is ready", retry_after=self.wait(now))
        unique = {item.identity: item for item in reversed(job.items)}
        shares: dict[str, list[tuple[Item, Lease]]] = {}
        for item in sorted(unique.values(), key=lambda item: (-item.tokens, item.index)):
            demand = Demand(max(1, item.tokens), item.identity)
            lease = holds.add(self._balancer.take(Role.ENCODE, candidates, demand))
            shares.setdefault(lease.instance.url, []).append((item, lease))
        legs = []
        for share in shares.values():
            items = tuple(sorted((item for item, _ in share), key=lambda item: item.index))
            leases = [lease for _, lease in share]
            legs.append(self._leg(Role.ENCODE, leases[0].instance, leases, holds, items))
        return legs

    def _generation(
        self, path: Path, job: Job, now: float, tried: Collection[str], family: str, holds: Holds
    ) -> list[Leg]:
        legs = []
        prompt = job.prompt_tokens
        for role in path.generation:
            if not (candidates := self._usable(role, now, tried, family)):
                raise NoInstance(f"no {role.label} engine is ready", retry_after=self.wait(now))
            # Decoding keeps the prompt's KV and grows by the output.
            tokens = prompt if role is Role.PREFILL else prompt + job.output_tokens
            lease = self._balancer.take(role, candidates, Demand(max(1, tokens)))
            legs.append(self._leg(role, lease.instance, [lease], holds))
        return legs

    def _leg(
        self, role: Role, instance: Instance, leases: list[Lease], holds: Holds, items: tuple[Item, ...] = ()
    ) -> Leg:
        held = holds.add(Held(leases, self.breakers.permit(instance.url)))
        return Leg(role, instance, items, held)

    def _usable(self, role: Role, now: float, tried: Collection[str], family: str) -> Pool:
        fitting, key = self._seen().fitting, (role, family)
        ready = fitting.get(key)
        if ready is None:
            ready = fitting[key] = Pool(i for i in self._fleet.ready(role) if self._families.fit(i, family))
        if not tried and self.breakers.all_allowed(now):
            return ready
        return Pool(i for i in ready.by_url.values() if i.url not in tried and self.breakers.allows(i.url, now))

    def _seen(self) -> _View:
        fleet, view = self._fleet, self._view
        fleet.refresh()
        if view.version != fleet.version:
            view = self._view = _View(fleet)
        return view

    def _family(self, job: Job, now: float) -> str:
        """The family that `job` goes to: the only one; else one that serves its model and is the least loaded."""
        listed = self._seen().listed
        if len(listed) < 2:
            return next(iter(listed), UNKNOWN)
        model = job.body.get("model")

        def rank(family: str) -> tuple[bool, bool, int, str]:
            answering = [i for i in self._fleet if i.dialect == family and Role.DECODE in i.role]
            loads = [self._balancer.ledger.load(i.url) for i in answering if i.state is State.READY]
            return (
                not self._serves(job, now, family),
                all(i.model != model for i in answering),
                min(loads, default=0),
                family,
            )

        return min(listed, key=rank)

    def _serves(self, job: Job, now: float, family: str) -> bool:
        try:
            self._route(job, now, NOBODY, family)
        except ProxyError:
            return False
        return True

    def _route(
        self, job: Job, now: float, tried: Collection[str], family: str, done: Role | None = None
    ) -> router.Route:
        """Raises BadRequest, NoInstance. `done`: a role whose legs are served already, whoever is up now."""
        if tried or done is not None or not self.breakers.all_allowed(now):
            return self._found_route(job, now, tried, family, done)
        routes, key = self._seen().routes, (family, len(job.items))
        route = routes.get(key)
        if route is None:
            route = routes[key] = self._found_route(job, now, tried, family, done)
        return route

    def _found_route(
        self, job: Job, now: float, tried: Collection[str], family: str, done: Role | None
    ) -> router.Route:
        census = self._census(now, tried, family)
        if done is not None and job.items:
            census[done] = Counter({State.READY: 1})
        param = job.items[0].param if job.items else None
        try:
            return router.route(len(job.items), census, param, self._inlines(family, census))
        except NoInstance as error:
            error.retry_after = self.wait(now)
            raise

    def _inlines(self, family: str, census: router.Census) -> tuple[Path, ...]:
        if family not in self._families.inline:
            return (Path.EPD,) if self._inline else ()
        return paths.INLINE if self._inline or Role.ENCODE not in census else ()

    def _census(self, now: float, tried: Collection[str], family: str) -> dict[Role, Counter[str]]:
        """How many instances of each role are in each state, or kept from work by their circuit."""
        counted: dict[Role, Counter[str]] = {}
        for instance in self._fleet:
            if UNKNOWN in (family, instance.dialect) or self._families.fit(instance, family):
                counted.setdefault(instance.role, Counter())[self._state(instance, now, tried)] += 1
        return counted

    def _state(self, instance: Instance, now: float, tried: Collection[str]) -> str:
        if instance.state is not State.READY:
            return instance.state
        if instance.url in tried:
            return "TRIED"
        if self.breakers.allows(instance.url, now):
            return State.READY
        return "BUSY" if self.breakers.circuit(instance.url, now) is Circuit.CLOSED else "OPEN"


def reader(plan: Plan) -> Instance:
    """Who prefills, and so reads the embeddings."""
    return plan.leg(BOTH if plan.path.combined else Role.PREFILL).instance


def family_of(plan: Plan) -> str:
    """That of its prefill and decode."""
    return reader(plan).dialect


def _close(leg: Leg) -> None:
    if leg.hold is not None:
        leg.hold.close()
