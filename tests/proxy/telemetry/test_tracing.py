"""Traces on their way to a collector, over real HTTP: what arrives, what a dead one costs, and what is not sent."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.core import Stage
from proxy.record import Record
from proxy.telemetry import trace, tracing
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import Tracing
from tests.fakes.deployment import deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.collector import collector, values
from tests.support.waiting import until

SAMPLED = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_EVERY_S", 0.02)


def request(of: Tracing, name: str = "me", legs: int = 1, headers: dict[str, str] | None = None) -> Record:
    """One that has ended."""
    begun = of.begin(SAMPLED if headers is None else headers)
    record = Record(id=name, api="/v1/chat/completions", began=1.0, ended=2.0, status=200, trace=begun)
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
        async with sender.running():
            for name in ("one", "two"):
                sender.ended(request(sender, name, legs=2))
            found = await sink.until(6)
        assert [values(span.attributes).get("triptych.request_id") for span in found[:2]] == ["one", "two"]
        assert all(span.trace_id.hex() == "a" * 32 for span in found)
        assert sink.resources[0]["service.name"] == "triptych-proxy"
        assert sink.resources[0]["service.instance.id"] == f"{socket.gethostname()}:{os.getpid()}"
        await until(lambda: counted(metrics) == (6, 0))


async def test_the_event_loop_has_its_turn_soon_while_spans_are_made() -> None:
    before = sys.getswitchinterval()
    async with Tracing("http://127.0.0.1:9", 1.0, Metrics()).running():
        assert sys.getswitchinterval() <= 0.001
    assert sys.getswitchinterval() == before


async def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    async with collector() as sink:
        sender = Tracing(sink.url, 1.0, Metrics())
        async with sender.running():
            sender.ended(request(sender))
    told = {"service.name": "front", "deployment.environment.name": "test"}
    assert sink.resources[0].items() >= told.items()


async def test_what_is_left_at_the_end_is_sent() -> None:
    async with collector() as sink:
        sender = Tracing(f"{sink.url}/v1/traces", 1.0, Metrics())
        async with sender.running():
            sender.ended(request(sender))
        assert len(sink.spans) == 2


async def test_a_collector_that_refuses_costs_the_spans_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    async with collector() as sink:
        sender = Tracing(sink.url, 1.0, metrics)
        sink.status = 400
        async with sender.running():
            sender.ended(request(sender))
            await until(lambda: counted(metrics) == (0, 2))
            sink.status = 200
            sender.ended(request(sender))
            await until(lambda: counted(metrics) == (2, 2))
    told = [entry.getMessage() for entry in caplog.records if entry.name == "proxy.telemetry.tracing"]
    assert told == [f"{sink.url}/v1/traces does not take traces: they are dropped until it does"], caplog.records


async def test_a_dead_collector_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_LAST_S", 0.1)
    async with collector() as sink:
        pass
    sender = Tracing(sink.url, 1.0, Metrics())
    async with asyncio.timeout(tracing._TIMEOUT_S), sender.running():
        sender.ended(request(sender))


def test_the_queue_is_bounded_and_what_it_does_not_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_QUEUE", 3)
    metrics = Metrics()
    sender = Tracing("http://nobody", 1.0, metrics)
    for _ in range(5):
        sender.ended(request(sender, legs=3))
    assert counted(metrics) == (0, 8)


def test_who_is_not_sampled_is_not_sent() -> None:
    sender = Tracing("http://nobody", 0.0, Metrics())
    not_sampled = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}
    for headers in ({}, not_sampled):
        record = request(sender, headers=headers)
        assert record.legs[0].context.endswith("-00"), "engines are told so"
        sender.ended(record)
    sender.ended(Record())
    assert not sender._queue


def test_opentelemetry_is_not_even_imported_where_nothing_is_traced() -> None:
    code = (
        "import sys, proxy.app, proxy.telemetry.tracing;"
        "print([n for n in sys.modules if n.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- through a whole proxy


def told(spans: list[Span]) -> list[tuple[str, str]]:
    """(name, outcome or status) of each."""
    found = [values(span.attributes) for span in spans]
    return [
        (span.name, str(of.get("triptych.outcome", of.get("http.response.status_code"))))
        for span, of in zip(spans, found, strict=True)
    ]


async def test_every_leg_is_told_and_its_engine_knows_its_span() -> None:
    async with collector() as sink, deployment("1e1p2d", "pull", otlp_endpoint=sink.url, trace_sample=0.0) as d:
        faults = deque([Fault(Kind.STATUS, status=500)])  # for whoever is asked first
        for decode in d.decodes:
            decode.faults = faults
        headers = {"traceparent": SAMPLED["traceparent"], "tracestate": "v=1", "x_request_id": "me"}
        answer = await d.post(chat(part(image()), stream=True), **headers)
        assert answer.status == 200
        request, *legs = await sink.until(6)
        assert told([request, *legs]) == [
            ("POST /v1/chat/completions", "200"),
            ("encode", "ok"),
            ("prefill", "ok"),
            ("decode", "server_error"),
            ("prefill", "ok"),
            ("decode", "ok"),
        ]
        assert {span.trace_id.hex() for span in legs} == {"a" * 32}
        assert (request.parent_span_id.hex(), {span.parent_span_id for span in legs}) == ("b" * 16, {request.span_id})
        calls = [call for engine in d.engines for call in engine.calls]
        assert {call.headers["traceparent"] for call in calls} == {f"00-{'a' * 32}-{s.span_id.hex()}-01" for s in legs}
        assert all(call.headers["tracestate"] == "v=1" for call in calls)
        attributes = values(request.attributes)
        assert attributes["triptych.route"] == answer.route
        assert (attributes["triptych.request_id"], attributes["triptych.attempts"]) == ("me", 2)
        assert [event.name for event in request.events] == ["admitted", "planned", "retry", "first_token"]
        ports = [values(leg.attributes)["server.port"] for leg in legs[:2]]
        assert ports == [d.encoders[0].port, d.prefills[0].port]


async def test_what_never_became_a_job_is_one_span() -> None:
    async with collector() as sink, deployment("1b", otlp_endpoint=sink.url, trace_sample=1.0) as d:
        assert (await d.post(b"{")).status == 400
        (span,) = await sink.until(1)
        assert told([span]) == [("POST /v1/chat/completions", "400")]
        assert span.status.code == Status.STATUS_CODE_UNSET, "the client's mistake"


async def test_an_unsampled_request_tells_its_engines_so_and_leaves_no_span() -> None:
    async with collector() as sink, deployment("1b", otlp_endpoint=sink.url, trace_sample=0.0) as d:
        await d.post(chat())
        (call,) = d.combined[0].calls
        found = trace.parsed(call.headers["traceparent"])
        assert found is not None and not found[2]
        await d.post(chat(), traceparent=SAMPLED["traceparent"])
        assert [span.trace_id.hex() for span in await sink.until(2)] == ["a" * 32] * 2


async def test_without_a_collector_the_clients_context_passes_as_it_came() -> None:
    async with deployment("1b") as d:
        await d.post(chat(), traceparent="00-what-ever", tracestate="v=1")
        (call,) = d.combined[0].calls
        assert (call.headers["traceparent"], call.headers["tracestate"]) == ("00-what-ever", "v=1")
