"""One run: a fleet of machines, policies, faults and arrivals in; what became of every request out. Deterministic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from random import Random

from bench.simulator.clock import Clock
from bench.simulator.courses import Course, World
from bench.simulator.encoders import Encoder
from bench.simulator.faults import Fault, Kill
from bench.simulator.links import RDMA, LinkBetween, everywhere
from bench.simulator.machines import Machine, Park
from bench.simulator.parsing import Parser
from bench.simulator.requests import Request
from bench.simulator.results import Results
from bench.simulator.stations import Station
from proxy.balancer import POLICIES
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.balancer.policy import Means
from proxy.balancer.rates import Rates
from proxy.breaker import Breakers, Thresholds
from proxy.core import ROLES, Role
from proxy.lessons import Lessons
from proxy.media.costs import Costs
from proxy.media.vision import FAMILIES, Vision
from proxy.planning.families import Families
from proxy.planning.plan import Planner
from proxy.planning.prospects import PLAIN, Sight

FAMILY = "native"
PROBE_S = 1.0  # until the proxy's probes see that an engine died, or is back
_PROGRESS = 50_000  # requests between two words of it


class Simulation:
    """Offer requests, then run it once. `fleet`, `balancer`, `planner` and `clock` may be looked at meanwhile."""

    def __init__(
        self,
        machines: Iterable[Machine],
        policies: Mapping[Role, str] | str = "affinity",
        *,
        seed: int = 0,
        embedding_link: LinkBetween | None = None,
        kv_link: LinkBetween | None = None,
        faults: Iterable[Fault] = (),
        vision: Vision = FAMILIES["qwen3_vl"],
        sight: Sight = PLAIN,
    ) -> None:
        """`policies`: by role, or one for all; roles without any get least_loaded.

        `vision` is what the proxy prices media by: right or wrong, engines take as long as their own models say.
        `sight` is what flags say of predictions; roles with the policy `affinity` are weighed in any case.
        """
        self.clock = Clock()
        self.results = Results()
        self._arrived = 0  # requests
        self.fleet = Fleet()
        self._park = Park(self.clock, tuple(machines))
        named = dict.fromkeys(ROLES, policies) if isinstance(policies, str) else policies
        dice = Random(seed).random
        rates = {role: Rates(prior) for role, prior in PRIORS.items()}
        chosen = {r: POLICIES[named.get(r, "least_loaded")](Means(r, rates[r], dice)) for r in ROLES}
        self.balancer = Balancer(chosen, rates=rates)
        inline = any(engine.spec.vision is not None for engine in self._park.engines.values())
        families = Families(inline=(FAMILY,)) if inline else Families()
        weighed = frozenset(role for role in ROLES if named.get(role) == "affinity")
        sight = replace(sight, weighed=weighed.union(sight.weighed))
        self.planner = Planner(self.fleet, self.balancer, Breakers(Thresholds()), inline, families, sight)
        for machine in self._park.machines.values():
            instance = self.fleet.join(machine.url, machine.role, FAMILY, machine.told)
            self.fleet.apply(instance, Event.HEALTHY, "simulated")
        for fault in faults:
            self._schedule(fault)
        visions = [m.spec.vision for m in self._park.machines.values() if isinstance(m.spec, Encoder)]
        rdma = everywhere(RDMA)
        inlets = {url: Station(self.clock) for url in self._park.engines}
        self._world = World(
            self.clock,
            self.planner,
            Parser(vision),
            self._park,
            visions[0] if visions else None,
            embedding_link or rdma,
            kv_link or rdma,
            inlets,
            Lessons(self.balancer, Costs()),
            self.results,
        )

    def offer(self, request: Request, at: float) -> None:
        """One request, which arrives at `at`."""
        self.clock.at(at, self._arrive, request)

    def run(
        self, arrivals: Iterable[tuple[float, Request]] = (), progress: Callable[[int], None] | None = None
    ) -> Results:
        """Until all that was offered, and all of `arrivals` (in order of time), has ended.

        Raises RuntimeError if some request never does, or leaves load behind: a mistake in this program.
        `progress` is called now and then with the number of requests that have arrived.
        """
        self._follow(iter(arrivals), 0, progress)
        self.clock.run()
        if len(self.results) != self._arrived or self.balancer.ledger.leases():
            raise RuntimeError(f"{len(self.results)} of {self._arrived} requests ended: {self.balancer.ledger!r}")
        return self.results

    def _follow(
        self, arrivals: Iterator[tuple[float, Request]], count: int, progress: Callable[[int], None] | None
    ) -> None:
        """Only the next arrival is ever in the clock, so that a million of them need no memory."""
        if progress is not None and count and count % _PROGRESS == 0:
            progress(count)
        following = next(arrivals, None)
        if following is not None:
            at, request = following
            self.clock.at(at, self._arrive_and_follow, request, arrivals, count + 1, progress)

    def _arrive_and_follow(
        self,
        request: Request,
        arrivals: Iterator[tuple[float, Request]],
        count: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._arrive(request)
        self._follow(arrivals, count, progress)

    def _arrive(self, request: Request) -> None:
        self._arrived += 1
        Course(self._world, request).begin()

    # ---- faults

    def _schedule(self, fault: Fault) -> None:
        machine = self._park.at(fault.url)
        if isinstance(fault, Kill):
            self.clock.at(fault.at, machine.kill)
            self.clock.at(fault.at + PROBE_S, self._probed, fault.url, Event.FAILED)
            if fault.until is not None:
                self.clock.at(fault.until, machine.restart)
                self.clock.at(fault.until + PROBE_S, self._probed, fault.url, Event.HEALTHY)
            return
        self.clock.at(fault.at, partial(setattr, machine, "slowness", fault.times))
        if fault.until is not None:
            self.clock.at(fault.until, partial(setattr, machine, "slowness", self._park.machines[fault.url].slowness))

    def _probed(self, url: str, event: Event) -> None:
        instance = self.fleet.get(url)
        if instance is not None:
            if event is Event.HEALTHY:
                self.planner.breakers.forget(url)  # it is another process
            self.fleet.apply(instance, event, "simulated")
