from __future__ import annotations

from prometheus_client import CollectorRegistry

from engines.language.engine import Stats
from engines.language.metrics import Metrics


def test_gauges_show_the_engine_as_it_is_when_asked() -> None:
    stats = Stats()
    registry = CollectorRegistry()
    Metrics(registry, lambda: stats)
    assert registry.get_sample_value("triptych_running") == 0
    stats = Stats(waiting=1, running=2, remote=3, swapped=4, free_blocks=5, preemptions=6)
    for name, value in (("waiting", 1), ("running", 2), ("remote", 3), ("swapped", 4), ("free_blocks", 5)):
        assert registry.get_sample_value(f"triptych_{name}") == value
    assert registry.get_sample_value("triptych_preemptions_total") == 6


def test_histograms_have_their_labels() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, Stats)
    metrics.kv_transfer.labels("received").observe(0.5)
    metrics.first_token.observe(0.5)
    assert registry.get_sample_value("triptych_kv_transfer_seconds_count", {"direction": "received"}) == 1
    assert registry.get_sample_value("triptych_first_token_seconds_sum") == 0.5
