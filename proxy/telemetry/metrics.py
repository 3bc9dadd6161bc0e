"""Everything that the proxy counts, for Prometheus. Values come from elsewhere: nothing is timed or counted twice here.

Most of it is taken from a request's Record when that is over. Over several workers all of it is summed (`tally`); what
is so now of the fleet is told by its owners (`standing`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import INF, floatToGoString

from proxy.core import Stage
from proxy.record import Record
from proxy.retry import Cause
from proxy.telemetry import tally
from proxy.telemetry.tally import Cell

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LE = [floatToGoString(bound) for bound in (*_SECONDS, INF)]  # type: ignore[no-untyped-call]  # as they are written
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DECISION_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1)
_LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ITEMS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_ATTEMPTS = (1, 2, 3, 4, 5, 8)

Observe = Callable[[float], None]
Gather = Callable[[], Awaitable[None]]
Format = Callable[[Collector], bytes]
"""Writes an exposition."""


class Metrics:
    """A registry of its own, so that two proxies in one process do not collide."""

    def __init__(self, shared: Path | None = None, counting: bool = True) -> None:
        """`shared`: the folder with the counts of all workers, where `tally` is installed. `counting`: whether anybody
        is to be told; else only what goes wrong is counted."""
        self._shared = shared
        self.counting = counting
        self._registry = CollectorRegistry()
        self._standing: list[Collector] = []
        self._exemplars: dict[tuple[str, str], Exemplar] = {}  # of this worker's requests, where they are traced
        self._gathers: list[Gather] = []
        self.known: Callable[[], Collection[str]] | None = None  # the instances that there are; others are not shown
        self._stages = {
            name: _fast(self._histogram(f"{name}_seconds", what, _SECONDS))
            for name, what in {
                "encode": "From the first encode call of a request to the last encoder's answer",
                "prefill": "From the prefill call to the prefill engine's answer",
                "decode": "From the end of prefill, or the call of an engine that does both, to the end of the answer",
                "ttft": "From the request's arrival to the first byte that proves success",
                "e2e": "From the request's arrival to the end of its answer",
            }.items()
        }
        self.requests = self._counter("requests", "Requests ended, by path and status", "path", "status")
        self.failures = self._counter("failures", "Legs that failed, by stage and error code", "stage", "code")
        self.causes = self._counter(
            "leg_failures",
            "Legs that failed, by stage and what it was: connect, timeout, broken, server_error, busy, lost, client",
            *("stage", "cause"),
        )
        self.retries = self._counter("retries", "Legs sent to another instance", "stage")
        for stage in (Stage.ENCODE, Stage.PREFILL, Stage.DECODE):  # from 0: of a series that begins at 1, rates miss it
            self.retries.labels(stage)
            for cause in Cause:
                self.causes.labels(stage, cause)
        self.fallbacks = self._counter(
            "fallbacks",
            "Requests not served on the best path: no_encoder or no_pair (none was ready), or why a leg failed",
            "reason",
        )
        self.openings = self._counter("circuit_openings", "Circuits opened by failed legs", "role", "instance")
        self.refused = self._counter(
            "refused", "Requests that were not admitted, by modality and error code", "modality", "code"
        )
        self.hedges = self._counter("hedges", "Second attempts beside a slow encoder")
        self.resumes = self._counter("resumes", "Streams continued by another instance")
        self.joins = self._counter("single_flight_joins", "Items sent to where the same was being encoded already")
        self.bytes = self._counter("bytes", "Body bytes by direction", "direction")
        self.items = self._counter("items", "Media items received, by modality", "modality")
        self.spans = self._counter("spans", "Spans of traces, by what became of them: exported, dropped", "result")
        self.in_flight = self._gauge("requests_in_flight", "Requests not yet ended")
        self.queued = self._gauge("requests_queued", "Requests that wait to be admitted")
        self.lag = _fast(self._histogram("event_loop_lag_seconds", "By how much timers are late", _LAG_SECONDS))
        self._ending()

    def _ending(self) -> None:
        """What `ended` counts."""
        self._counted: dict[tuple[str, int], Cell] = {}  # of `requests`: finding a child costs as much as counting
        self._received, self._sent = (_cell(self.bytes.labels(way)) for way in ("from_clients", "to_clients"))
        tokens = self._counter("tokens", "Tokens of requests, as engines count them, else predicted", "kind")
        self._prompt, self._output = (_cell(tokens.labels(kind)) for kind in ("prompt", "output"))
        cached = self._counter(
            "cache_items", "Items by whether their encoder had the embedding, where it tells", "result"
        )
        self._hits, self._misses = (_cell(cached.labels(result)) for result in ("hit", "miss"))
        self._queue = _fast(self._histogram("queue_seconds", "From a request's arrival to its admission", _SECONDS))
        self._decision = _fast(
            self._histogram("decision_seconds", "To choose a path and its instances", _DECISION_SECONDS)
        )
        self._token = _fast(
            self._histogram("token_seconds", "Of a request's answer, per token after the first", _TOKEN_SECONDS)
        )
        self._number = _fast(self._histogram("request_items", "Media items of a request", _ITEMS))
        self._attempts = _fast(self._histogram("attempts", "Attempts that a request took", _ATTEMPTS))
        transfer = self._histogram(
            "transfer_seconds",
            "From the end of prefill to the first token of a stream: the KV's bytes, a queue and a step",
            *(_SECONDS, "link"),
        )
        self._kv = _fast(transfer.labels("prefill_decode"))

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"triptych_{name}", what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"triptych_{name}", what, registry=self._registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, what: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"triptych_{name}", what, labels, buckets=bounds, registry=self._registry)

    # ---- counting

    def observe(self, stage: str, seconds: float) -> None:
        """`stage` is encode, prefill, decode or ttft."""
        if self.counting:
            self._stages[stage](seconds)

    def ended(self, record: Record) -> None:
        """A request is over."""
        if not self.counting:
            return
        count = self._counted.get((record.path, record.status))
        if count is None:
            counter = self.requests.labels(record.path, str(record.status))
            count = self._counted[record.path, record.status] = _cell(counter)
        count[0] += 1
        self._received[0] += record.received
        self._sent[0] += record.sent
        if record.admitted:
            self._queue(record.admitted - record.began)
            self._stages["e2e"](record.ended - record.began)
        if record.drawn:
            self._decision(record.drawn - record.admitted)
            self._attempts(record.attempts)
            self._number(record.items)
        if record.first:
            self._answered(record)
        if record.trace is not None and record.trace.sampled:
            self._exemplify(record, f"{record.trace.id:032x}")

    def _exemplify(self, record: Record, trace: str) -> None:
        """Where a dashboard shows a latency, it can lead to a trace that took as long."""
        for name, end in (("e2e", record.ended), ("ttft", record.first)):
            if end:
                seconds = end - record.began
                bucket = f"triptych_{name}_seconds_bucket", _LE[bisect_left(_SECONDS, seconds)]
                self._exemplars[bucket] = Exemplar({"trace_id": trace}, seconds)

    def _answered(self, record: Record) -> None:
        """Also what broke off."""
        tokens = record.output_tokens
        self._prompt[0] += record.prompt_tokens
        self._output[0] += tokens
        if record.stream:
            if tokens > 1:
                self._token((record.ended - record.first) / (tokens - 1))
        elif tokens:
            self._token((record.ended - record.legs[-1].began) / tokens)
        if len(record.legs) > 1:
            self._between(record)

    def _between(self, record: Record) -> None:
        """What went from one stage to the next."""
        prefilled = first = 0.0
        for leg in record.legs:
            if leg.stage is Stage.ENCODE:
                self.joins.inc(sum([choice.joined for choice in leg.choices]))
                self._hits[0] += leg.hits
                self._misses[0] += leg.misses
            elif leg.stage is Stage.PREFILL:
                prefilled = leg.ended
            elif leg.first:
                first = leg.first
        if record.stream and first > prefilled > 0:
            self._kv(first - prefilled)

    # ---- telling

    def also(self, standing: Collector, gather: Gather | None = None) -> None:
        """Show these gauges too, which their owner knows for all workers once `gather` has returned."""
        self._standing.append(standing)
        if gather is not None:
            self._gathers.append(gather)

    async def gather(self) -> None:
        """To be awaited before `render`."""
        for gather in self._gathers:
            await gather()

    def requests_now(self) -> tuple[int, int]:
        """Requests in flight, and those of them that wait to be admitted, over all workers."""
        told = self._registry.get_sample_value if self._shared is None else tally.live(self._shared).get
        in_flight, queued = (int(told(f"triptych_requests_{what}") or 0) for what in ("in_flight", "queued"))
        return in_flight, queued

    def render(self, form: Format = generate_latest) -> bytes:
        """The exposition, with the gauges read from their owners now."""
        counted = self._registry if self._shared is None else tally.summed(self._shared)
        known = None if self.known is None else self.known()
        return form(_Shown([counted, *self._standing], self._exemplars, known))


class _Shown(Collector):
    """`exemplars` by a sample's name and its bucket; `known`: see Metrics."""

    def __init__(
        self,
        collectors: Iterable[Collector],
        exemplars: Mapping[tuple[str, str], Exemplar],
        known: Collection[str] | None,
    ) -> None:
        self._collectors = collectors
        self._exemplars = exemplars
        self._known = known

    def collect(self) -> Iterator[Metric]:
        known = None if self._known is None else {None, *self._known}  # None: it is of no instance
        for collector in self._collectors:
            for metric in collector.collect():
                if self._exemplars and metric.type == "histogram":
                    metric.samples = [self._with_exemplar(sample) for sample in metric.samples]
                elif metric.type == "counter" and known is not None:
                    metric.samples = [s for s in metric.samples if s.labels.get("instance") in known]
                yield metric

    def _with_exemplar(self, sample: Sample) -> Sample:
        exemplar = self._exemplars.get((sample.name, sample.labels.get("le", "")))
        return sample if exemplar is None else sample._replace(exemplar=exemplar)


def _cell(counter: Counter) -> Cell:
    return tally.cell(counter._value)


def _fast(histogram: Histogram) -> Observe:
    """`observe` without the library's checks and calls: 0.15 µs against 0.4 to 0.9 µs, and ten are due per request."""
    bounds, total = histogram._upper_bounds, tally.cell(histogram._sum)
    counts = [tally.cell(bucket) for bucket in histogram._buckets]

    def observe(value: float) -> None:
        total[0] += value
        counts[bisect_left(bounds, value)][0] += 1.0

    return observe
