"""How many engines of each role the offered load needs, and which stage gives way first. Pure: starts no engine.

Rate matching. A stage s is offered L_s = tokens offered / tokens that one engine works off, both per second: so many
engines are busy with it. It is carried while L_s <= n_s · u_s, where u is the part of its time that an engine may be
busy. Encodes differ so much in size that a line forms long before an encoder has no idle moment left. Its mean wait, in
mean encode times, is ρ/(1-ρ) · (1+CV²)/2 (Pollaczek-Khinchine), and `Limits.wait` of it is allowed:

    u_encode = min(encode, 2w / (1 + CV² + 2w))

Combined engines share their time between prefill and decode so that both are equally busy; where prefill or decode
engines stand beside them, they help whichever is the busier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from math import ceil, inf

from proxy.core import BOTH, ROLES, Role

_EXACT = 1 + 1e-9  # a stage at its limit carries its load, whatever the division left over


@dataclass(frozen=True, slots=True)
class Offered:
    """What arrives in a second."""

    requests: float
    encode: float  # tokens of encode work that no cache spares
    prompt: float  # prompt tokens, media included, that no cache spares
    output: float  # tokens
    spread: float = 1.0  # of the work of one encode: squared coefficient of variation


@dataclass(frozen=True, slots=True)
class Carried:
    """The fleet, and the tokens that one engine works off in a second if it does nothing else."""

    engines: Mapping[Role, int]  # of each role that there is or may be
    encode: float  # tokens of encode work
    prefill: float  # prompt tokens
    decode: float  # output tokens of all that one engine decodes at once


@dataclass(frozen=True, slots=True)
class Limits:
    """The part of its time that an engine of each stage may be busy."""

    encode: float = 0.9
    prefill: float = 0.9
    decode: float = 0.92
    wait: float = 4.0  # for an encoder, on average, in mean encode times

    def of(self, role: Role, spread: float) -> float:
        if role is Role.ENCODE:
            return min(self.encode, 2 * self.wait / (1 + spread + 2 * self.wait))
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, BOTH: min(self.prefill, self.decode)}[role]


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Need:
    """One role's part of an advice."""

    role: Role
    engines: int  # there are
    utilisation: float  # part of their time that they are busy; inf: there is work, and no engine
    limit: float  # of it
    carries: float  # requests per second, at that limit
    advised: int  # engines
    one_more: float  # requests per second that the fleet would carry more with one engine more of this role


@dataclass(frozen=True, slots=True)
class Advice:
    needs: tuple[Need, ...]  # of every role of the fleet, in the order of the stages
    bottleneck: Role  # the stage that gives way first as the load grows
    carries: float  # requests per second that the fleet carries as it is
    would_carry: float  # with the advised engines

    @property
    def advised(self) -> dict[Role, int]:
        """Engines by role."""
        return {need.role: need.advised for need in self.needs}


def advise(offered: Offered, carried: Carried, engines: int | None = None, limits: Limits = LIMITS) -> Advice:
    """The fewest engines of each role that carry what is offered; with `engines`, the split of so many that carries
    most. At least one of each role stays. Combined engines beside prefill and decode engines stay as they are.

    Raises ValueError if nothing is offered, what one engine carries is not positive, no role can answer, or `engines`
    are too few.
    """
    fleet = _Fleet(offered, carried, limits)
    now = {role: carried.engines[role] for role in fleet.roles}
    if engines is None:
        advised = fleet.grown(fleet.floor(), lambda grown: fleet.strain(grown) <= _EXACT)
    elif engines < sum(fleet.least.values()):
        raise ValueError(f"{engines} engines cannot have all the roles of {sum(fleet.least.values())}")
    else:
        advised = fleet.grown(fleet.least, lambda grown: sum(grown.values()) == engines)
    strains = fleet.strains(now)
    carries = fleet.carries(now)
    needs = tuple(
        Need(
            role,
            now[role],
            strains[role] * fleet.limits[role],
            fleet.limits[role],
            _per(offered.requests, strains[role]),
            advised[role],
            fleet.carries({**now, role: now[role] + 1}) - carries,
        )
        for role in fleet.roles
    )
    return Advice(needs, max(strains, key=strains.__getitem__), carries, fleet.carries(advised))


@dataclass(frozen=True, slots=True)
class Move:
    """One engine's change of role."""

    source: Role
    target: Role
    carries: float  # requests per second that the fleet carries as it is
    would_carry: float  # after it


def best_move(offered: Offered, carried: Carried, limits: Limits = LIMITS) -> Move | None:
    """The change of one engine between prefill and decode by which the fleet carries most. The last of a role stays.
    None where none makes it carry more. Raises ValueError as `advise` does."""
    fleet = _Fleet(offered, carried, limits)
    now = {role: carried.engines[role] for role in fleet.roles}
    carries = fleet.carries(now)
    moves = [
        Move(source, target, carries, fleet.carries({**now, source: now[source] - 1, target: now[target] + 1}))
        for source, target in permutations((Role.PREFILL, Role.DECODE))
        if now.get(source, 0) > 1 and target in now
    ]
    best = max(moves, key=lambda move: move.would_carry, default=None)
    return best if best is not None and best.would_carry > carries else None


@dataclass(slots=True)
class _Fleet:
    """The arithmetic of one advice. A role's strain is its utilisation over its limit; numbers of engines vary."""

    offered: Offered
    carried: Carried
    given: Limits
    roles: list[Role] = field(init=False)
    growing: list[Role] = field(init=False)  # those whose number is advised
    limits: dict[Role, float] = field(init=False)
    loads: dict[Role, float] = field(init=False)  # engines busy, of the three stages
    least: dict[Role, int] = field(init=False)

    def __post_init__(self) -> None:
        offered, carried = self.offered, self.carried
        if not (offered.requests > 0 and offered.prompt + offered.output > 0):
            raise ValueError("nothing is offered")
        if min(carried.encode, carried.prefill, carried.decode) <= 0:
            raise ValueError("an engine that carries nothing cannot be counted on")
        self.roles = [role for role in ROLES if role in carried.engines]
        apart = Role.PREFILL in self.roles and Role.DECODE in self.roles
        if not apart and BOTH not in self.roles:
            raise ValueError("no role of the fleet can answer: prefill and decode, or both in one")
        self.growing = [role for role in self.roles if role is not BOTH or not apart]
        self.limits = {role: self.given.of(role, offered.spread) for role in self.roles}
        self.loads = {
            Role.ENCODE: offered.encode / carried.encode,
            Role.PREFILL: offered.prompt / carried.prefill,
            Role.DECODE: offered.output / carried.decode,
        }
        if Role.ENCODE not in self.roles:  # whoever prefills encodes
            self.loads[Role.PREFILL] += self.loads[Role.ENCODE]
        self.least = {role: 1 if role in self.growing else carried.engines[role] for role in self.roles}

    def strains(self, engines: Mapping[Role, int]) -> dict[Role, float]:
        loads, both = self.loads, engines.get(BOTH, 0)
        prefill, decode = (engines.get(role, 0) for role in (Role.PREFILL, Role.DECODE))
        generating = loads[Role.PREFILL] + loads[Role.DECODE]
        # The combined engines that prefill, if prefill and decode are to be equally busy.
        lent = (loads[Role.PREFILL] * (decode + both) - loads[Role.DECODE] * prefill) / generating
        lent = min(max(lent, 0.0), float(both))
        found = {
            Role.ENCODE: _per(loads[Role.ENCODE], engines.get(Role.ENCODE, 0)),
            Role.PREFILL: _per(loads[Role.PREFILL], prefill + lent),
            Role.DECODE: _per(loads[Role.DECODE], decode + both - lent),
        }
        if both:
            shares = ((lent, found[Role.PREFILL]), (both - lent, found[Role.DECODE]))
            found[BOTH] = sum(share * busy for share, busy in shares if share) / both
        else:
            found[BOTH] = max(found[Role.PREFILL], found[Role.DECODE])
        return {role: found[role] / self.limits[role] for role in self.roles}

    def strain(self, engines: Mapping[Role, int]) -> float:
        return max(self.strains(engines).values())

    def carries(self, engines: Mapping[Role, int]) -> float:
        """Requests per second."""
        return _per(self.offered.requests, self.strain(engines))

    def floor(self) -> dict[Role, int]:
        """Fewer than these carry the load in no way."""
        both = 0 if BOTH in self.growing else self.least.get(BOTH, 0)
        loads = self.loads | {BOTH: self.loads[Role.PREFILL] + self.loads[Role.DECODE]}
        needed = {role: ceil(loads[role] / self.limits[role] / _EXACT) for role in self.growing}
        helped = {role: count - both if role is not Role.ENCODE else count for role, count in needed.items()}
        return self.least | {role: max(1, count) for role, count in helped.items()}

    def grown(self, engines: Mapping[Role, int], enough: Callable[[Mapping[Role, int]], bool]) -> dict[Role, int]:
        """`engines`, and one after the other where it lowers the strain most, until `enough`; where one alone lowers
        nothing, at a stage that is strained most."""
        grown = dict(engines)
        while not enough(grown):
            strains = self.strains(grown)
            ranks = {role: (self.strain({**grown, role: grown[role] + 1}), -strains[role]) for role in self.growing}
            grown[min(self.growing, key=ranks.__getitem__)] += 1
        return grown


def _per(amount: float, share: float) -> float:
    return amount / share if share else inf if amount else 0.0
