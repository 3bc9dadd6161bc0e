"""A request's plan: route it, choose an instance for every leg, charge them. Synchronous; nothing is sent here.

A plan is drawn whole, and mended leg by leg: `redraw` and `encoder` choose again without the instances that failed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Lease
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.breaker import Breakers, Permit
from proxy.core import BOTH, Instance, Item, Job, Leg, Path, Plan, Role
from proxy.errors import NoInstance, ProxyError
from proxy.planning.candidates import NOBODY, Candidates
from proxy.planning.draft import Drafts, Taken
from proxy.planning.families import Families
from proxy.planning.freight import Cargo, Freight
from proxy.planning.joint import Pools
from proxy.planning.prospects import PLAIN, Prospects, Sight, unique
from proxy.record import Choice
from proxy.retry import avoidance, rule
from proxy.routing import paths, router

_INLINE = "encoders failed, encoding inline"

ALIKE = Families()


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


@dataclass(slots=True)
class Held:
    """A leg's leases and its permit, and the embeddings that are on their way to it."""

    leases: list[Lease]
    permit: Permit
    cargo: Cargo | None = None

    def succeeded(self) -> None:
        self.permit.succeeded()

    def failed(self, error: Exception, now: float) -> bool:
        if not isinstance(error, ProxyError):
            return False
        return self.permit.failed(rule(error).blame, now, avoidance(error))

    def prefilled(self) -> None:
        if self.cargo is not None:
            self.cargo.close()
        for lease in self.leases:
            if lease.role is Role.PREFILL:
                lease.close()

    def close(self) -> None:
        self.permit.close()
        for lease in self.leases:
            lease.close()
        if self.cargo is not None:
            self.cargo.close()


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


class Planner:
    """Draws plans on one fleet with one balancer. Every leg's hold is added to the Holds that it is given."""

    def __init__(
        self,
        fleet: Fleet,
        balancer: Balancer,
        breakers: Breakers,
        inline: bool = False,
        families: Families = ALIKE,
        sight: Sight = PLAIN,
    ) -> None:
        """`inline`: engines may encode where encoders fail, or where that is foreseen to be sooner."""
        self._balancer = balancer
        self.breakers = breakers
        self._inline = inline
        self._families = families
        self._sight = sight
        self._candidates = Candidates(fleet, breakers, inline, families)
        self._prospects = Prospects(balancer, sight.links)
        self._drafts = Drafts(fleet, balancer, self._prospects, sight, families)
        self._freight = Freight(sight.max_embedding_bytes)

    def draw(self, job: Job, now: float, holds: Holds) -> Plan:
        """The plan for `job` on the instances that may be used now. Raises BadRequest or NoInstance."""
        family = self._candidates.family(job, now, self._balancer.ledger.load)
        route = self._route(job, now, family)
        path = route.path
        if path.generation[0] in self._sight.weighed:
            return self._weighed(route, job, now, family, holds)
        encodes: Sequence[Leg] = ()
        if path.encodes:
            encodes = self._encodes(unique(job.items), now, family, holds)
        generation = self._generation(path, job, now, NOBODY, family, holds, encodes)
        foreseen = 0.0
        if self._sight.always:
            ready = self._prospects.ready(leg.instance.url for leg in encodes)
            role, url = generation[0].role, generation[0].instance.url
            work = self._prospects.demand(path, role, job).work
            foreseen = self._prospects.expected(job, role, url, work, ready)
        return Plan(path, route.reason, (*encodes, *generation), foreseen, route.lacks)

    def foresee(self, job: Job, now: float) -> float:
        """Predicted seconds to the first token of `job` if it began now. Nothing is charged. Raises BadRequest or
        NoInstance."""
        family = self._candidates.family(job, now, self._balancer.ledger.load)
        route = self._candidates.route(job, now, NOBODY, family)
        return self._prospects.soonest(route, job, lambda role: self._some(role, now, family))

    def has_room(self, job: Job, now: float) -> bool:
        """Whether somebody may be sent the embeddings of `job` now, by `Sight.max_embedding_bytes`."""
        full = self._freight.full(_nbytes(unique(job.items)))
        if not full:
            return True
        try:
            family = self._candidates.family(job, now, self._balancer.ledger.load)
            path = self._candidates.route(job, now, NOBODY, family).path
        except ProxyError:
            return True  # drawing its plan will say why
        return not path.encodes or any(url not in full for url in self._some(path.generation[0], now, family))

    def redraw(self, plan: Plan, job: Job, now: float, tried: Collection[str], holds: Holds) -> Plan | None:
        """`plan` with prefill and decode anywhere but at `tried`, perhaps combined; None if nobody else can."""
        for leg in plan.legs:
            if leg.role is not Role.ENCODE:
                _close(leg)
        try:
            family, path = family_of(plan), plan.path
            if path not in paths.INLINE:
                path = self._candidates.route(job, now, tried, family, Role.ENCODE).path
            legs = self._generation(path, job, now, tried, family, holds, plan.encodes)
        except NoInstance:
            return None
        return replace(plan, path=path, legs=(*plan.encodes, *legs))

    def encode_again(self, plan: Plan, job: Job, now: float, holds: Holds) -> Plan:
        """`plan` with its encode legs drawn anew. Raises NoInstance."""
        others = [leg for leg in plan.legs if leg.role is not Role.ENCODE]
        for leg in plan.encodes:
            _close(leg)
        items = unique(item for leg in plan.encodes for item in leg.items)
        return replace(plan, legs=(*self._encodes(items, now, family_of(plan), holds), *others))

    def inline(self, plan: Plan, job: Job, now: float, holds: Holds) -> Plan | None:
        """`plan` at engines that get the media themselves; None if this deployment has none, or it must not."""
        family = family_of(plan)
        if not self.can_inline(plan, now):
            return None
        if family in self._families.inline:
            return replace(plan, path=paths.inline(plan.path), reason=_INLINE)
        kept = [leg for leg in plan.legs if leg.role == BOTH and self._candidates.takes_media(leg.instance)]
        for leg in plan.legs:
            if leg.role is not Role.ENCODE and leg not in kept:
                _close(leg)
        legs = kept or self._generation(Path.EPD, job, now, NOBODY, family, holds)
        return replace(plan, path=Path.EPD, reason=_INLINE, legs=(*plan.encodes, *legs))

    def can_inline(self, plan: Plan, now: float) -> bool:
        """Whether `inline` would find somebody."""
        family = family_of(plan)
        if not self._inline or family in self._families.inline:
            return self._inline
        return bool(self._candidates.pool(BOTH, now, NOBODY, family, inline=True))

    def encoder(
        self, items: Sequence[Item], now: float, tried: Collection[str], family: str, holds: Holds
    ) -> Leg | None:
        """One leg for all of `items` anywhere but at `tried`; None if there is nobody else."""
        encoders = self._candidates.pool(Role.ENCODE, now, tried, family)
        if not encoders:
            return None
        demand = _asked(items[0]) if len(items) == 1 else Demand(sum(item.work for item in items))
        lease = self._balancer.take(Role.ENCODE, encoders, demand)
        return self._leg(Role.ENCODE, [lease], holds, tuple(items))

    def wait(self, now: float) -> float | None:
        """Seconds until the first instance that is kept from work may be tried again; None if none is."""
        return self._candidates.wait(now)

    def _route(self, job: Job, now: float, family: str) -> router.Route:
        """Raises BadRequest, NoInstance."""
        route = self._candidates.route(job, now, NOBODY, family)
        if not route.others:
            return route
        path, reason = self._prospects.decided(route, job, family, lambda role: self._some(role, now, family))
        return router.Route(path, reason)

    def _some(self, role: Role, now: float, family: str) -> Pool:
        """Raises NoInstance."""
        return self._candidates.some(role, now, NOBODY, family)

    # ---- legs

    def _weighed(self, route: router.Route, job: Job, now: float, family: str, holds: Holds) -> Plan:
        """One whose legs are chosen by what is foreseen of the others."""
        path = route.path
        role = path.generation[0]
        readers = self._candidates.some(role, now, NOBODY, family, path in paths.INLINE)
        if path.encodes:
            readers = self._with_room(readers, _nbytes(unique(job.items)))
        encoders = self._some(Role.ENCODE, now, family) if path.encodes else None
        decoders = None if path.combined else self._some(Role.DECODE, now, family)
        draft = self._drafts.draw(path, job, Pools(role, readers, encoders, decoders), family, holds)
        encodes = self._shares(draft.encodes, holds)
        legs = [*encodes, self._leg(role, [draft.reader], holds, cargo=_nbytes(item for item, _ in draft.encodes))]
        if draft.decoder is not None:
            legs.append(self._leg(Role.DECODE, [draft.decoder], holds))
        return Plan(draft.path, draft.reason or route.reason, tuple(legs), draft.seconds, route.lacks)

    def _encodes(self, items: Sequence[Item], now: float, family: str, holds: Holds) -> list[Leg]:
        """Each of `items` chooses for itself, in this order. Raises NoInstance."""
        encoders, take = self._some(Role.ENCODE, now, family), self._balancer.take
        return self._shares([(item, holds.add(take(Role.ENCODE, encoders, _asked(item)))) for item in items], holds)

    def _shares(self, taken: Taken, holds: Holds) -> list[Leg]:
        """One leg per encoder that took an item."""
        shares: dict[str, list[tuple[Item, Lease]]] = {}
        for item, lease in taken:
            shares.setdefault(lease.instance.url, []).append((item, lease))
        legs = []
        for share in shares.values():
            items = tuple(sorted((item for item, _ in share), key=lambda item: item.index))
            legs.append(self._leg(Role.ENCODE, [lease for _, lease in share], holds, items))
        return legs

    def _generation(
        self,
        path: Path,
        job: Job,
        now: float,
        tried: Collection[str],
        family: str,
        holds: Holds,
        encodes: Sequence[Leg] = (),
    ) -> list[Leg]:
        """Legs each chosen for itself, with the embeddings of `encodes` on their way to the first."""
        legs = []
        cargo = _nbytes(item for leg in encodes for item in leg.items) if encodes else 0
        for role in path.generation:
            pool = self._candidates.some(role, now, tried, family, path in paths.INLINE)
            if cargo:
                pool = self._with_room(pool, cargo)
            lease = self._balancer.take(role, pool, self._prospects.demand(path, role, job))
            legs.append(self._leg(role, [lease], holds, cargo=cargo))
            cargo = 0
        return legs

    def _with_room(self, readers: Pool, nbytes: int) -> Pool:
        """Those of them with room for so many bytes; all, if that is nobody: the request has been let in."""
        full = self._freight.full(nbytes)
        return (readers.without(full) or readers) if full else readers

    def _leg(self, role: Role, leases: list[Lease], holds: Holds, items: tuple[Item, ...] = (), cargo: int = 0) -> Leg:
        instance = leases[0].instance
        held = holds.add(Held(leases, self.breakers.permit(instance.url)))
        if cargo and self._freight.most is not None:
            held.cargo = self._freight.send(instance.url, cargo)
        choices: tuple[Choice, ...] = ()
        if len(leases) > 1 or leases[0].choice is not None:
            choices = tuple([lease.choice for lease in leases if lease.choice is not None])
        return Leg(role, instance, items, held, choices)


def reader(plan: Plan) -> Instance:
    """Who prefills, and so reads the embeddings."""
    return plan.leg(BOTH if plan.path.combined else Role.PREFILL).instance


def family_of(plan: Plan) -> str:
    """That of its prefill and decode."""
    return reader(plan).dialect


def _asked(item: Item) -> Demand:
    return Demand(item.work, item.identity, room=item.tokens)


def _close(leg: Leg) -> None:
    if leg.hold is not None:
        leg.hold.close()


def _nbytes(items: Iterable[Item]) -> int:
    """Of their embeddings."""
    return sum(item.nbytes for item in items)
