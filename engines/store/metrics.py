"""The Prometheus objects of an engine's embedding store. They are told, and measure nothing themselves."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)

Lookup = Literal["hit", "miss", "error", "skipped"]
"""error: no answer in time, or one that was wrong. skipped: there was no store, or no room to read into."""
WriteResult = Literal["written", "refused", "error", "skipped"]
"""refused: the store is full. skipped: as above, or too much waits already."""
LOOKUPS: tuple[Lookup, ...] = ("hit", "miss", "error", "skipped")
WRITES: tuple[WriteResult, ...] = ("written", "refused", "error", "skipped")


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._lookups = Counter(
            "triptych_embedding_store_lookups",
            "Embeddings that were looked for in the store, by what came of it",
            ("result",),
            registry=registry,
        )
        self._writes = Counter(
            "triptych_embedding_store_writes",
            "Embeddings that were to be put there, by what came of it",
            ("result",),
            registry=registry,
        )
        self._bytes = Counter(
            "triptych_embedding_store_bytes", "Bytes of rows: read, written", ("direction",), registry=registry
        )
        for counter, results in ((self._lookups, LOOKUPS), (self._writes, WRITES), (self._bytes, ("read", "written"))):
            for result in results:
                counter.labels(result)  # told as 0 before the first one
        self.seconds = Histogram(
            "triptych_embedding_store_lookup_seconds",
            "Seconds from asking the store to rows that are checked, or to knowing that there are none",
            registry=registry,
            buckets=SECONDS,
        )
        self.connected = Gauge(
            "triptych_embedding_store_connected", "1 while the store can be asked, else 0", registry=registry
        )
        self.counts: dict[str, dict[str, int]] = {
            "lookups": dict.fromkeys(LOOKUPS, 0),
            "writes": dict.fromkeys(WRITES, 0),
        }
        """The same, for /info."""

    def lookup(self, result: Lookup, nbytes: int = 0) -> None:
        self.counts["lookups"][result] += 1
        self._lookups.labels(result).inc()
        self._bytes.labels("read").inc(nbytes)

    def write(self, result: WriteResult, nbytes: int = 0) -> None:
        self.counts["writes"][result] += 1
        self._writes.labels(result).inc()
        self._bytes.labels("written").inc(nbytes)
