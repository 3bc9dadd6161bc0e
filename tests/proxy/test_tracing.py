"""Traces on their way to a collector, over real HTTP: what arrives, what a dead one costs, and what is not sent."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import count

import pytest

from proxy import tracing
from proxy.core import Stage
from proxy.metrics import Metrics
from proxy.record import Record
from proxy.tracing import Tracing
from tests.support.collector import collector, values
from tests.support.waiting import until

SAMPLED = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


def request(of: Tracing, name: str = "me", legs: int = 1, headers: dict[str, str] | None = None) -> Record:
    """One that has ended."""
    trace = of.begin(dict(SAMPLED if headers is None else headers))
    record = Record(id=name, api="/v1/chat/completions", began=1.0, ended=2.0, status=200, trace=trace)
    for _ in range(legs):
        record.leg(Stage.DECODE, "http://d:1", 0, 1.0)
    return record


def counted(metrics: Metrics) -> tuple[int, int]:
    """Spans exported and dropped."""
    lines = dict(
        line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if "triptych_spans_total{" in line
    )
    told = [float(lines[f'triptych_spans_total{{result="{result}"}}']) for result in ("exported", "dropped")]
    return int(told[0]), int(told[1])


async def test_what_has_ended_arrives_with_the_name_of_its_proxy() -> None:
    metrics = Metrics()
    async with collector() as sink:
        sender = Tracing(sink.url, 1.0, metrics)
        async with sender.running("here:8000"):
            for name in ("one", "two"):
                sender.end(request(sender, name, legs=2))
            found = await sink.until(6)
        assert [values(span.attributes).get("triptych.request_id") for span in found[:2]] == ["one", "two"]
        assert all(span.trace_id.hex() == "a" * 32 for span in found)
        assert sink.resources[0]["service.name"] == "triptych-proxy"
        assert sink.resources[0]["service.instance.id"] == "here:8000"
        await until(lambda: counted(metrics) == (6, 0))


async def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    async with collector() as sink:
        sender = Tracing(sink.url, 1.0, Metrics())
        async with sender.running("me"):
            sender.end(request(sender))
    told = {"service.name": "front", "service.instance.id": "me", "deployment.environment.name": "test"}
    assert sink.resources[0].items() >= told.items()


async def test_what_is_left_at_the_end_is_sent() -> None:
    async with collector() as sink:
        sender = Tracing(f"{sink.url}/v1/traces", 1.0, Metrics())
        async with sender.running(""):
            sender.end(request(sender))
        assert len(sink.spans) == 2


async def test_a_collector_that_refuses_costs_the_spans_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    async with collector() as sink:
        sender = Tracing(sink.url, 1.0, metrics)
        sink.status = 400
        async with sender.running(""):
            sender.end(request(sender))
            await until(lambda: counted(metrics) == (0, 2))
            sink.status = 200
            sender.end(request(sender))
            await until(lambda: counted(metrics) == (2, 2))
    told = [entry.getMessage() for entry in caplog.records if entry.name == "proxy.tracing"]
    assert told == [f"{sink.url}/v1/traces does not take traces: they are dropped until it does"], caplog.records


async def test_a_dead_collector_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_LAST_S", 0.1)
    async with collector() as sink:
        pass
    sender = Tracing(sink.url, 1.0, Metrics())
    async with asyncio.timeout(tracing._TIMEOUT_S), sender.running(""):
        sender.end(request(sender))


def test_the_queue_is_bounded_and_what_it_does_not_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_QUEUE", 3)
    metrics = Metrics()
    sender = Tracing("http://nobody", 1.0, metrics)
    for _ in range(5):
        sender.end(request(sender, legs=3))
    assert counted(metrics) == (0, 8)


def test_who_is_not_sampled_is_not_sent() -> None:
    sender = Tracing("http://nobody", 0.0, Metrics())
    not_sampled = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}
    for headers in ({}, not_sampled):
        record = request(sender, headers=headers)
        assert record.legs[0].context.endswith("-00"), "engines are told so"
        sender.end(record)
    sender.end(Record())
    assert not sender._ended


def test_the_callers_headers_give_way_to_ours() -> None:
    numbers = count(1)
    sender = Tracing("http://nobody", 0.0, Metrics(), lambda bits: next(numbers))
    known = {**SAMPLED, "tracestate": "v=1", "baggage": "b"}
    assert (sender.begin(known).parent, known) == (int("b" * 16, 16), {"tracestate": "v=1", "baggage": "b"})
    unknown = {"traceparent": "00-what", "tracestate": "v=1", "baggage": "b"}
    assert (sender.begin(unknown).parent, unknown) == (0, {"baggage": "b"}), "what is not understood is not passed on"


def test_opentelemetry_is_not_even_imported_where_nothing_is_traced() -> None:
    code = "import sys, proxy.app, proxy.tracing; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
