"""Every Prometheus object of the encoder. It measures nothing itself: the encoder tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)

CacheResult = Literal["hit", "joined", "miss"]
"""hit: cached. joined: someone was encoding it already. miss: encoded for this item, or found in the embedding store
(which counts its own hits)."""


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._stage = Histogram(
            "triptych_encode_stage_seconds",
            "Seconds of one item in a stage: fetch, decode (with preprocessing), forward (with its queue), publish",
            ("stage",),
            registry=registry,
            buckets=SECONDS,
        )
        self.item = Histogram(
            "triptych_encode_item_seconds", "Seconds from item to handle", registry=registry, buckets=SECONDS
        )
        self._forward = Histogram(
            "triptych_encode_forward_seconds", "Seconds of one batch in the model", registry=registry, buckets=SECONDS
        )
        self._batch_items = Histogram(
            "triptych_encode_batch_items", "Items of one batch", registry=registry, buckets=POWERS
        )
        self._batch_patches = Histogram(
            "triptych_encode_batch_patches",
            "Patches of one batch",
            registry=registry,
            buckets=[256 * n for n in POWERS],
        )
        self._cache = Counter("triptych_encode_cache", "Items by cache result", ("result",), registry=registry)
        self.evicted = Counter("triptych_encode_cache_evicted", "Embeddings evicted", registry=registry)
        self._failed = Counter("triptych_encode_failed", "Items that failed, by code", ("code",), registry=registry)

    def stage(self, name: str, seconds: float) -> None:
        self._stage.labels(name).observe(seconds)

    def cache(self, result: CacheResult) -> None:
        self._cache.labels(result).inc()

    def failed(self, code: str) -> None:
        self._failed.labels(code).inc()

    def forward(self, items: int, patches: int, seconds: float) -> None:
        self._forward.observe(seconds)
        self._batch_items.observe(items)
        self._batch_patches.observe(patches)

    def watch(self, queue: Callable[[], Mapping[str, int]], cache: Callable[[], Mapping[str, int]]) -> None:
        """Gauges that ask when they are read."""
        for prefix, source in (("queue", queue), ("cache", cache)):
            for key in source():
                gauge = Gauge(f"triptych_encode_{prefix}_{key}", f"{prefix} {key}, now", registry=self.registry)
                gauge.set_function(lambda source=source, key=key: source()[key])  # type: ignore[misc]
