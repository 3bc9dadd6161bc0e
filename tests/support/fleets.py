"""Labelled fleets with loads and rates of their own, and the best plan for them by trying all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random

from proxy.balancer import POLICIES
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.balancer.policy import Means
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, ROLES, Api, Instance, Item, Job, Role
from proxy.planning.joint import Pools
from proxy.planning.links import HOP, Links, Place

KV = 1000  # bytes per token


def mixture(**families: str) -> Fleet:
    """READY engines of families by name, as their roles: native="encode both"."""
    found = Fleet()
    for family, labels in families.items():
        for number, label in enumerate(labels.split()):
            instance = found.join(f"http://{family}-{label}{number}", Role.named(label), family)
            instance.model = f"model-of-{family}"
            found.apply(instance, Event.HEALTHY, "")
    return found


@dataclass
class Labelled:
    """A fleet of one family. `weighed` roles have the policy `affinity`."""

    weighed: Iterable[Role] = ROLES
    links: Links = field(default_factory=Links)
    family: str = "native"

    def __post_init__(self) -> None:
        self.fleet = Fleet()
        self.rates = {role: Rates(prior) for role, prior in PRIORS.items()}
        names = {role: "affinity" if role in self.weighed else "least_loaded" for role in ROLES}
        policies = {role: POLICIES[name](Means(role, self.rates[role])) for role, name in names.items()}
        self.balancer = Balancer(policies, None, self.rates)

    def add(self, role: Role, count: int = 1, *, load: int = 0, rate: float = 0.0, **labels: str) -> list[Instance]:
        """So many of one role at one place, each with `load` tokens before it, and `rate` seconds per token."""
        found = []
        for _ in range(count):
            number = sum(1 for _ in self.fleet)
            facts = {"labels": labels} if labels else {}
            instance = self.fleet.join(f"http://{role.label}{number}", role, self.family, facts)
            self.fleet.apply(instance, Event.HEALTHY, "")
            if load:
                self.balancer.ledger.lease(instance, role, load)
            for _ in range(20 if rate else 0):
                self.rates[role].observe(instance.url, 1, 0, rate)
            found.append(instance)
        return found

    def pools(self, role: Role, encodes: bool = True) -> Pools:
        """Everybody, where `role` prefills."""

        def all_of(role: Role) -> Pool:
            return Pool(self.fleet.ready(role))

        return Pools(
            role,
            all_of(role),
            all_of(Role.ENCODE) if encodes else None,
            None if role == BOTH else all_of(Role.DECODE),
        )

    @classmethod
    def random(cls, dice: Random, encoders: int = 3, readers: int = 3, decoders: int = 2) -> Labelled:
        """Small, with prefill and decode apart, on three hosts in two racks."""
        found = cls(links=Links(host=1e9, rack=1e8, zone=1e8, other=1e7))
        for role, most in ((Role.ENCODE, encoders), (Role.PREFILL, readers), (Role.DECODE, decoders)):
            for _ in range(dice.randint(1, most)):
                host = dice.choice("abc")
                load, rate = dice.choice((0, 0, dice.randint(1, 20_000))), dice.choice((1e-5, 2e-5, 5e-5))
                if role is Role.DECODE:
                    load, rate = 0, 1e-5  # else its policy weighs the pace of the whole answer
                found.add(role, load=load, rate=rate, rack="r" if host in "ab" else "s", host=host)
        return found

    # ---- all plans

    def first_token(self, job: Job, encoders: Sequence[Instance], reader: Instance, decoder: Instance) -> float:
        """Seconds until it is there, if the items of `job` go to these encoders."""
        ledger, place, rate = self.balancer.ledger, Place.of(reader), self.links.rate
        done: dict[str, float] = {}
        moving = job.prompt_tokens * KV / rate(place, Place.of(decoder))
        for item, encoder in zip(job.items, encoders, strict=True):
            each = self.rates[Role.ENCODE].seconds(encoder.url)
            done[encoder.url] = done.get(encoder.url, ledger.load(encoder.url) * each) + item.work * each
            moving += item.nbytes / rate(Place.of(encoder), place)
        each = self.rates[reader.role].seconds(reader.url)
        pending = ledger.load(reader.url) * each
        return max(pending, *(HOP + seconds for seconds in done.values()), 0.0) + job.prompt_tokens * each + moving

    def best(self, job: Job, reader: Instance | None = None) -> float:
        """Of all plans, or all with this reader."""
        encoders, decoders = self.fleet.ready(Role.ENCODE), self.fleet.ready(Role.DECODE)
        readers = [reader] if reader else self.fleet.ready(Role.PREFILL)
        return min(
            self.first_token(job, chosen, one, decoder)
            for one, decoder, chosen in product(readers, decoders, product(encoders, repeat=len(job.items)))
        )


def job(*works: int, text: int = 100, output: int = 16, nbytes: int = 1000) -> Job:
    """One with an item of each work, as many tokens, and `nbytes` bytes of embedding for each token."""
    items = tuple(Item(n, 0, n, "image", {}, None, f"i{n}-{w}", w, w, w * nbytes) for n, w in enumerate(works))
    return Job("id", Api.CHAT, {"model": "m"}, items, text, output, False)
