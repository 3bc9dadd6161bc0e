"""The language engine's Prometheus objects, all of them. It decides nothing and is read by /metrics alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from engines.language.engine import Stats
from engines.language.roles import ROLES, Roles

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class _Preemptions(Collector):
    """The scheduler counts them; a Counter of our own would count them twice."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily("triptych_preemptions", "Sequences swapped out because the KV cache was full")
        family.add_metric([], self._stats().preemptions)
        return [family]


class Metrics:
    """`stats` is asked whenever /metrics is."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], Stats]) -> None:
        self.registry = registry
        for name, text in (
            ("waiting", "Sequences that hold nothing yet"),
            ("running", "Sequences in the batch"),
            ("remote", "Sequences whose KV another engine is sending"),
            ("swapped", "Sequences in host memory, or waiting for a place in the batch"),
            ("free_blocks", "KV blocks that are free"),
        ):
            gauge = Gauge(f"triptych_{name}", text, registry=registry)
            gauge.set_function(partial(_field, stats, name))
        registry.register(_Preemptions(stats))
        self.first_token = Histogram(
            "triptych_first_token_seconds", "From request to first token", registry=registry, buckets=SECONDS
        )
        self.per_token = Histogram(
            "triptych_per_token_seconds", "From one token to the next", registry=registry, buckets=SECONDS
        )
        self.embeddings = Histogram(
            "triptych_embedding_receive_seconds",
            "From request to embeddings, where there are items",
            registry=registry,
            buckets=SECONDS,
        )
        self.kv_transfer = Histogram(
            "triptych_kv_transfer_seconds",
            "Receiving: from reserved blocks to filled ones. Sending: what was left to send when prefill was over",
            ("direction",),
            registry=registry,
            buckets=SECONDS,
        )
        self.tokens = Counter(
            "triptych_tokens",
            "Tokens of answered requests: prompt, those of it that were cached, generated",
            ("kind",),
            registry=registry,
        )

    def follow(self, roles: Roles) -> None:
        """Tell of these, too."""
        role = Gauge("triptych_role", "1 for the role that this engine has now", ("role",), registry=self.registry)
        for name in ROLES:
            role.labels(name).set_function(partial(_is, roles, name))


def _is(roles: Roles, name: str) -> float:
    return float(roles.now == name)


def _field(stats: Callable[[], Stats], name: str) -> float:
    return float(getattr(stats(), name))
