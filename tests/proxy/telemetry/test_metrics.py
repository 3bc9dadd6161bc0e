"""What is exposed after real requests, by name."""

import asyncio

import pytest
from prometheus_client import Histogram
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from proxy.balancer.fleet import Event
from proxy.core import Role
from proxy.record import Record
from proxy.telemetry.metrics import _SECONDS, Metrics, _fast
from proxy.telemetry.trace import Trace
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.waiting import until


async def samples(d: Deployment) -> dict[tuple[str, ...], float]:
    text = (await d.get("/metrics")).body.decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_can_fail_is_told_before_it_does_so_that_its_first_time_shows_in_rates() -> None:
    async with deployment("1b") as d:
        found = await samples(d)
        for stage in ("encode", "prefill", "decode"):
            assert found["triptych_retries_total", stage] == 0
            assert all(
                found["triptych_leg_failures_total", cause, stage] == 0 for cause in ("connect", "timeout", "lost")
            )


async def test_every_stage_has_a_histogram_and_leases_return_to_zero() -> None:
    async with deployment("1e1p1d") as d:
        await d.post(chat(part(image()), stream=True))
        d.decodes[0].fail(Fault(Kind.STATUS, status=503))
        await d.post(chat())
        await d.post(b"{")
        await d.settle()
        found = await samples(d)
        for stage in ("encode", "prefill", "decode", "ttft"):
            assert found[f"triptych_{stage}_seconds_count",] == 1
        assert found["triptych_e2e_seconds_count",] == 2
        assert found["triptych_requests_total", "E-P-D", "200"] == 1
        assert found["triptych_requests_total", "P-D", "503"] == 1
        assert found["triptych_requests_total", "none", "400"] == 1
        assert found["triptych_failures_total", "503", "decode"] == 1
        assert found["triptych_items_total", "image"] == 1
        assert all(found["triptych_leases", role] == 0 for role in ("encode", "prefill", "decode", "both"))
        assert found["triptych_instances", "decode", "READY"] == 1
        assert found["triptych_load_tokens", d.decodes[0].netloc, "decode"] == 0
        assert found["triptych_requests_in_flight",] == 0
        assert all(found["triptych_bytes_total", way] > 0 for way in ("from_clients", "to_engines", "to_clients"))


async def test_a_request_is_counted_once_when_it_is_over() -> None:
    async with deployment("1e1p1d") as d:
        d.encoders[0].cached = False
        await d.post(chat(part(image()), part(image(9, 9)), stream=True))
        d.encoders[0].cached = True
        await d.post(chat(part(image())))
        found = await samples(d)
    for name in ("queue_seconds", "decision_seconds", "token_seconds", "request_items", "attempts", "e2e_seconds"):
        assert found[f"triptych_{name}_count",] == 2, name
    assert found["triptych_request_items_sum",] == 3 and found["triptych_request_items_bucket", "1.0"] == 1
    assert found["triptych_attempts_bucket", "1.0"] == 2
    assert found["triptych_tokens_total", "prompt"] > 0 and found["triptych_tokens_total", "output"] > 0
    assert found["triptych_transfer_seconds_count", "prefill_decode"] == 1, "of a stream"
    assert found["triptych_cache_items_total", "hit"] == 1 and found["triptych_cache_items_total", "miss"] == 2


async def test_a_refused_request_has_no_part_in_how_long_requests_take() -> None:
    async with deployment("1b") as d:
        await d.post(b"{")
        found = await samples(d)
    assert found["triptych_requests_total", "none", "400"] == 1
    assert found["triptych_e2e_seconds_count",] == found["triptych_attempts_count",] == 0


async def test_every_way_from_the_best_path_is_a_fallback_with_its_reason() -> None:
    async with deployment("1e2b", inline_encoding=True) as d:
        d.encoders[0].always = Fault(Kind.STATUS, status=500)
        assert (await d.post(chat(part(image())))).status == 200
        (encoder,) = d.proxy.fleet.ready(Role.ENCODE)
        d.proxy.fleet.apply(encoder, Event.FAILED, "gone")
        assert (await d.post(chat(part(image())))).status == 200
        found = await samples(d)
    assert found["triptych_fallbacks_total", "server_error"] == found["triptych_fallbacks_total", "no_encoder"] == 1


async def test_an_item_in_flight_is_joined() -> None:
    async with deployment("2e1b") as d:
        gate = asyncio.Event()
        for encoder in d.encoders:
            encoder.gate = gate
        async with asyncio.TaskGroup() as group:
            group.create_task(d.post(chat(part(image()))))
            await until(lambda: sum(encoder.running for encoder in d.encoders) == 1)
            group.create_task(d.post(chat(part(image()))))
            await until(lambda: sum(encoder.running for encoder in d.encoders) == 2)
            gate.set()
        assert (await samples(d))["triptych_single_flight_joins_total",] == 1


async def test_openmetrics_is_written_where_it_is_asked_for() -> None:
    async with deployment("1b") as d:
        await d.post(chat())
        async with d.http.get(
            f"{d.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        ) as r:
            assert r.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            families = {family.name for family in openmetrics(await r.text())}
        assert {"triptych_requests", "triptych_build_info", "triptych_leases", "triptych_queue_seconds"} <= families
        answer = await d.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("value", [0.0, 0.0005, 0.001, 0.0010001, 0.7, 300.0, 301.0])
def test_observing_fast_is_observing(value: float) -> None:
    slow, fast = (Histogram("x", "y", buckets=_SECONDS, registry=None) for _ in range(2))
    slow.observe(value)
    _fast(fast)(value)
    assert [sample.value for sample in fast.collect()[0].samples[:-1]] == [
        sample.value for sample in slow.collect()[0].samples[:-1]
    ]


async def test_requests_of_this_moment_are_told() -> None:
    async with deployment("1b", max_concurrent=1) as d:
        gate = d.combined[0].gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(d.post(chat()))
            await until(lambda: d.proxy.metrics.requests_now() == (3, 2))
            gate.set()
        assert d.proxy.metrics.requests_now() == (0, 0)


@pytest.mark.parametrize(("sampled", "expected"), [(True, [("0.25", 0.2), ("5.0", 3.0)]), (False, [])])
def test_a_traced_request_stands_as_an_example_where_its_latency_is(
    sampled: bool, expected: list[tuple[str, float]]
) -> None:
    metrics = Metrics()
    record = Record(began=1.0, admitted=1.0, drawn=1.0, first=1.2, ended=4.0, status=200)
    record.trace = Trace(7, 8, 0, sampled, lambda bits: 1)
    metrics.observe("ttft", 0.2)
    metrics.ended(record)
    shown = [
        (sample.labels["le"], round(sample.exemplar.value, 6))
        for family in openmetrics(metrics.render(generate_openmetrics).decode())
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"trace_id": f"{7:032x}"}
    ]
    assert sorted(shown) == expected
    assert b"trace_id" not in metrics.render(), "text has no place for them"


async def test_an_instance_that_is_gone_is_shown_no_more() -> None:
    async with deployment("2b", breaker_failures=1, breaker_delay=60) as d:
        for engine in d.combined:
            engine.fail(Fault(Kind.STATUS, status=500))
        await d.post(chat())
        opened = [name for name, *_ in await samples(d) if name == "triptych_circuit_openings_total"]
        assert len(opened) == 2
        gone = d.combined[0]
        d.proxy.fleet.remove(gone.url)
        shown = await samples(d)
        assert not [name for name in shown if gone.netloc in name]
        assert shown["triptych_circuit_openings_total", d.combined[1].netloc, "both"] == 1


async def test_off_nothing_is_counted_or_told() -> None:
    async with deployment("1b", metrics="off") as d:
        assert (await d.post(chat(stream=True))).status == 200
        assert (await d.get("/metrics")).status == 404
        told = d.proxy.metrics.render().decode()
    assert "triptych_requests_total{" not in told and "triptych_ttft_seconds_count 0.0" in told


async def test_every_name_begins_with_triptych() -> None:
    async with deployment("1b") as d:
        assert all(name.startswith("triptych_") for name, *_ in await samples(d))
