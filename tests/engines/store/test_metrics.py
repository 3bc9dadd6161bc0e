from __future__ import annotations

from prometheus_client import CollectorRegistry

from engines.store.metrics import LOOKUPS, WRITES, Metrics


def test_every_outcome_is_counted_for_metrics_and_for_info() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    assert told(registry)["triptych_embedding_store_lookups_total", "hit"] == 0
    for result in LOOKUPS:
        metrics.lookup(result, 100 if result == "hit" else 0)
    for outcome in WRITES:
        metrics.write(outcome, 7 if outcome == "written" else 0)
    assert metrics.counts == {"lookups": dict.fromkeys(LOOKUPS, 1), "writes": dict.fromkeys(WRITES, 1)}
    values = told(registry)
    assert [values["triptych_embedding_store_lookups_total", result] for result in LOOKUPS] == [1] * 4
    assert [values["triptych_embedding_store_writes_total", result] for result in WRITES] == [1] * 4
    assert values["triptych_embedding_store_bytes_total", "read"] == 100
    assert values["triptych_embedding_store_bytes_total", "written"] == 7


def told(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for family in registry.collect() for s in family.samples}
