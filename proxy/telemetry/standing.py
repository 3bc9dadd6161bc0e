"""What is so now of the fleet, as gauges: its owners are asked when somebody reads them. Nothing is counted here.

Load and state are one truth for all workers. Circuits are each worker's own: the others are asked for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version

import orjson
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.breaker import Breakers, Circuit
from proxy.core import ROLES, Role, State
from proxy.workers.siblings import Kind, Siblings

_NUMBERS = {Circuit.CLOSED: 0, Circuit.HALF_OPEN: 1, Circuit.OPEN: 2}
_STATES = sorted(set(State) - {State.GONE})
_PATIENCE_S = 0.5  # for another worker's answer


class Standing(Collector):
    """One per worker."""

    def __init__(
        self,
        fleet: Fleet,
        balancer: Balancer,
        breakers: Breakers,
        clock: Callable[[], float],
        settle: Callable[[], None],
        siblings: Siblings | None = None,
    ) -> None:
        """`settle`: counts what has not been counted yet, here."""
        self._fleet = fleet
        self._balancer = balancer
        self._breakers = breakers
        self._clock = clock
        self._settle = settle
        self._siblings = siblings
        self._elsewhere: dict[str, int] = {}  # by URL: the worst circuit of the other workers
        self._version = version("triptych")

    async def gather(self) -> None:
        """Learn what only the other workers know, and have all count what they have not. Whoever does not answer soon
        is left out."""
        self._settle()
        if self._siblings is not None:
            self._elsewhere = {}
            for answer in await self._siblings.ask_all(Kind.CIRCUITS, b"", _PATIENCE_S):
                for url, number in orjson.loads(answer).items():
                    self._elsewhere[url] = max(number, self._elsewhere.get(url, 0))

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Another worker's question: the circuits here that are not closed, as numbers by URL."""
        self._settle()
        circuits = {instance.url: self._circuit(instance.url) for instance in self._fleet}
        return 200, orjson.dumps({url: number for url, number in circuits.items() if number})

    def collect(self) -> Iterator[GaugeMetricFamily]:
        build = GaugeMetricFamily("triptych_build_info", "1, with the version that runs", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield from self._totals()
        yield from self._instances()

    def _totals(self) -> Iterator[GaugeMetricFamily]:
        leases = GaugeMetricFamily("triptych_leases", "Open leases, by role", labels=["role"])
        instances = GaugeMetricFamily("triptych_instances", "Instances by role and state", labels=["role", "state"])
        census = self._fleet.census()
        for role in ROLES:
            leases.add_metric([role.label], self._balancer.ledger.leases(role=role))
            for state in _STATES:
                instances.add_metric([role.label, state], census[role][state] if role in census else 0)
        yield from (leases, instances)

    def _instances(self) -> Iterator[GaugeMetricFamily]:
        labels = ["role", "instance"]
        load = GaugeMetricFamily("triptych_load_tokens", "Predicted tokens in work", labels=labels)
        pending = GaugeMetricFamily(
            "triptych_instance_pending_seconds",
            "Predicted seconds until all in work there is done; not of decode, whose legs run beside each other",
            labels=labels,
        )
        circuits = GaugeMetricFamily(
            "triptych_circuit_state", "0: closed, 1: half-open, 2: open; of several workers the worst", labels=labels
        )
        for instance in self._fleet:
            url, role, names = instance.url, instance.role, [instance.role.label, instance.netloc]
            tokens = self._balancer.ledger.load(url)
            load.add_metric(names, tokens)
            circuits.add_metric(names, max(self._circuit(url), self._elsewhere.get(url, 0)))
            if role is not Role.DECODE:
                pending.add_metric(names, tokens * self._balancer.rates[role].seconds(url))
        yield from (load, pending, circuits)

    def _circuit(self, url: str) -> int:
        return _NUMBERS[self._breakers.circuit(url, self._clock())]
