"""What /metrics says about the encoder."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from engines.encoder.metrics import Metrics


def test_every_name_begins_with_triptych_and_gauges_ask_when_read() -> None:
    metrics = Metrics(CollectorRegistry())
    queue = {"items": 1}
    metrics.watch(lambda: queue, lambda: {"items": 5, "bytes": 64})
    metrics.stage("decode", 0.5)
    metrics.item.observe(1.0)
    metrics.forward(items=2, patches=300, seconds=0.1)
    metrics.cache("hit")
    metrics.failed("invalid_image")
    metrics.evicted.inc()
    queue["items"] = 3
    text = generate_latest(metrics.registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.startswith("triptych_encode_") for line in lines)
    for line in (
        'triptych_encode_stage_seconds_count{stage="decode"} 1.0',
        "triptych_encode_queue_items 3.0",
        "triptych_encode_cache_bytes 64.0",
        'triptych_encode_cache_total{result="hit"} 1.0',
        'triptych_encode_failed_total{code="invalid_image"} 1.0',
        "triptych_encode_cache_evicted_total 1.0",
        "triptych_encode_batch_items_sum 2.0",
        'triptych_encode_batch_patches_bucket{le="512.0"} 1.0',
    ):
        assert line in lines
