"""Every Prometheus object of the proxy. Values come from elsewhere: nothing is timed or counted twice here.

Over several workers the counters are sums (`tally`), and the gauges of load and state are one truth already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from proxy import tally
from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Ledger
from proxy.core import ROLES, State
from proxy.record import Record

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """A registry of its own, so that two proxies in one process do not collide."""

    def __init__(self, shared: Path | None = None) -> None:
        """`shared`: the folder with the counts of all workers, where `tally` is installed."""
        self._shared = shared
        self._registry = registry = CollectorRegistry()
        self._standing: list[Collector] = []
        self._stages = {
            name: Histogram(f"triptych_{name}_seconds", what, buckets=_SECONDS, registry=registry)
            for name, what in {
                "encode": "From the first encode call of a request to the last encoder's answer",
                "prefill": "From the prefill call to the prefill engine's answer",
                "decode": "From the end of prefill, or the call of an engine that does both, to the end of the answer",
                "ttft": "From the request's arrival to the first byte that proves success",
                "e2e": "From the request's arrival to the end of its answer",
            }.items()
        }
        self.requests = Counter(
            "triptych_requests", "Requests ended, by path and status", ["path", "status"], registry=registry
        )
        self.failures = Counter(
            "triptych_failures", "Legs that failed, by stage and error code", ["stage", "code"], registry=registry
        )
        self.causes = Counter(
            "triptych_leg_failures",
            "Legs that failed, by stage and what it was: connect, timeout, broken, server_error, busy, lost, client",
            ["stage", "cause"],
            registry=registry,
        )
        self.retries = Counter("triptych_retries", "Legs sent to another instance", ["stage"], registry=registry)
        self.openings = Counter(
            "triptych_circuit_openings", "Circuits opened by failed legs", ["role", "instance"], registry=registry
        )
        self.queued = Gauge(
            "triptych_requests_queued",
            "Requests that wait to be admitted",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter(
            "triptych_refused",
            "Requests that were not admitted, by modality and error code",
            ["modality", "code"],
            registry=registry,
        )
        self.hedges = Counter("triptych_hedges", "Second attempts beside a slow encoder", registry=registry)
        self.resumes = Counter("triptych_resumes", "Streams continued by another instance", registry=registry)
        self.bytes = Counter("triptych_bytes", "Body bytes by direction", ["direction"], registry=registry)
        self.items = Counter("triptych_items", "Media items received, by modality", ["modality"], registry=registry)
        self.spans = Counter(
            "triptych_spans",
            "Spans of traces, by what became of them: exported, dropped",
            ["result"],
            registry=registry,
        )
        self._received, self._sent = (self.bytes.labels(way) for way in ("from_clients", "to_clients"))
        self._ended: dict[tuple[str, int], Counter] = {}  # of `requests`: finding a child costs as much as counting
        self.in_flight = Gauge(
            "triptych_requests_in_flight", "Requests not yet ended", registry=registry, multiprocess_mode="livesum"
        )

    def ended(self, record: Record) -> None:
        """A request is over."""
        counter = self._ended.get((record.path, record.status))
        if counter is None:
            counter = self._ended[record.path, record.status] = self.requests.labels(record.path, str(record.status))
        counter.inc()
        if record.admitted:
            self.observe("e2e", record.ended - record.began)
        self._received.inc(record.received)
        self._sent.inc(record.sent)

    def observe(self, stage: str, seconds: float) -> None:
        """`stage` is encode, prefill, decode, ttft or e2e."""
        self._stages[stage].observe(seconds)

    def also(self, standing: Collector) -> None:
        """Show these gauges too, which their owner knows for all workers."""
        self._standing.append(standing)

    def requests_now(self) -> tuple[int, int]:
        """Requests in flight, and those of them that wait to be admitted, over all workers."""
        told = self._registry.get_sample_value if self._shared is None else tally.live(self._shared).get
        in_flight, queued = (int(told(f"triptych_requests_{what}") or 0) for what in ("in_flight", "queued"))
        return in_flight, queued

    def render(self) -> bytes:
        """The exposition text, with the gauges read from their owners now."""
        counted = self._registry if self._shared is None else tally.summed(self._shared)
        return b"".join(map(generate_latest, [counted, *self._standing]))


class Standing(Collector):
    """What is so now, by its owners."""

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self._fleet = fleet
        self._ledger = ledger

    def collect(self) -> Iterator[GaugeMetricFamily]:
        leases = GaugeMetricFamily("triptych_leases", "Open leases, by role", labels=["role"])
        instances = GaugeMetricFamily("triptych_instances", "Instances by role and state", labels=["role", "state"])
        census = self._fleet.census()
        for role in ROLES:
            leases.add_metric([role.label], self._ledger.leases(role=role))
            for state in sorted(set(State) - {State.GONE}):
                instances.add_metric([role.label, state], census[role][state] if role in census else 0)
        load = GaugeMetricFamily("triptych_load_tokens", "Predicted tokens in work", labels=["role", "instance"])
        for instance in self._fleet:
            load.add_metric([instance.role.label, instance.netloc], self._ledger.load(instance.url))
        yield from (leases, load, instances)
