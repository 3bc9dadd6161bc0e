"""What a record becomes: names, kinds, parents, times and attributes of its spans."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from proxy.core import Stage
from proxy.record import CANCELLED, OK, Record
from proxy.telemetry.spans import spans
from proxy.telemetry.trace import begin

EPOCH = 1_700_000_000.0
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ended(**known: Any) -> Record:
    """A chat request from 10 to 14 s by its clock."""
    ids = count(1)
    told = {"id": "me", "api": "/v1/chat/completions", "model": "m", "began": 10.0, "ended": 14.0, "status": 200}
    return Record(**told | known, trace=begin(f"00-{TRACE}-{CALLER}-01", 0.0, lambda bits: next(ids)))


def of(record: Record) -> list[ReadableSpan]:
    return list(spans(record, EPOCH, Resource({})))


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_is_a_server_span_below_its_callers() -> None:
    known: dict[str, Any] = {
        "first": 11.5,
        "prompt_tokens": 300,
        "output_tokens": 20,
        "path": "E-PD",
        "route": "E-PD; …",
    }
    (span,) = of(ended(stream=True, items=2, attempts=1, caller="team-a", **known))
    assert (span.name, span.kind) == ("POST /v1/chat/completions", SpanKind.SERVER)
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == f"{span.parent.trace_id:032x}" == TRACE
    assert (span.context.span_id, f"{span.parent.span_id:016x}", span.parent.is_remote) == (1, CALLER, True)
    assert (span.start_time, span.end_time) == (int((EPOCH + 10) * 1e9), int((EPOCH + 14) * 1e9))
    assert span.status.status_code is StatusCode.UNSET
    assert told(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "triptych",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.time_to_first_chunk": 1.5,
        "gen_ai.usage.input_tokens": 300,
        "gen_ai.usage.output_tokens": 20,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "triptych.attempts": 1,
        "triptych.caller": "team-a",
        "triptych.items": 2,
        "triptych.path": "E-PD",
        "triptych.request_id": "me",
        "triptych.route": "E-PD; …",
    }


def test_its_events_tell_in_order_what_became_of_it() -> None:
    record = ended(admitted=10.5, drawn=10.6, first=12.0)
    record.note(11.0, "retry", "prefill: connect, goes on at P-D")
    record.note(10.1, "queued", "")
    (span,) = of(record)
    found = [(event.name, event.timestamp, dict(event.attributes or {})) for event in span.events]
    assert found == [
        (name, int((EPOCH + at) * 1e9), {"triptych.detail": detail} if detail else {})
        for name, at, detail in [
            ("queued", 10.1, ""),
            ("admitted", 10.5, ""),
            ("planned", 10.6, ""),
            ("retry", 11.0, "prefill: connect, goes on at P-D"),
            ("first_token", 12.0, ""),
        ]
    ]


def test_every_leg_is_a_client_span_with_the_context_that_its_engine_got() -> None:
    record = ended(attempts=2)
    leg = record.leg(Stage.PREFILL, "http://10.0.0.2:8002", 3, 10.2)
    leg.first, leg.ended, leg.outcome = 10.9, 11.0, OK
    request, span = of(record)
    assert (span.name, span.kind) == ("prefill", SpanKind.CLIENT)
    assert span.context is not None and request.context is not None and span.parent is not None
    assert leg.context == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert (span.parent.span_id, span.parent.trace_id) == (request.context.span_id, int(TRACE, 16))
    assert (span.start_time, span.end_time) == (int((EPOCH + 10.2) * 1e9), int((EPOCH + 11) * 1e9))
    assert [event.name for event in span.events] == ["handed_on"]
    assert told(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "http.request.method": "POST",
        "server.address": "10.0.0.2",
        "server.port": 8002,
        "triptych.attempt": 2,
        "triptych.items": 3,
        "triptych.outcome": "ok",
        "triptych.stage": "prefill",
    }


@pytest.mark.parametrize(
    ("outcome", "code", "error"),
    [("connect", StatusCode.ERROR, "connect"), (OK, StatusCode.UNSET, None), (CANCELLED, StatusCode.UNSET, None)],
)
def test_a_leg_that_failed_says_of_what(outcome: str, code: StatusCode, error: str | None) -> None:
    record = ended()
    record.leg(Stage.DECODE, "https://d", 0, 10.0).outcome = outcome
    _, span = of(record)
    assert (span.status.status_code, told(span).get("error.type")) == (code, error)
    assert told(span)["server.port"] == 443
    assert span.end_time == int((EPOCH + 14) * 1e9), "a leg whose end nobody told ends with its request"


@pytest.mark.parametrize(
    ("status", "code", "kind", "error"),
    [
        (502, "broken", StatusCode.ERROR, "broken"),
        (400, "too_deep", StatusCode.UNSET, "too_deep"),
        (499, "", StatusCode.UNSET, "499"),
    ],
)
def test_only_a_failure_of_ours_is_one_of_the_span(status: int, code: str, kind: StatusCode, error: str) -> None:
    (span,) = of(ended(status=status, code=code, error="decode: it broke"))
    assert (span.status.status_code, told(span)["error.type"]) == (kind, error)
    assert span.status.description == ("decode: it broke" if kind is StatusCode.ERROR else None)


def test_completions_are_another_operation() -> None:
    (span,) = of(ended(api="/v1/completions"))
    assert told(span)["gen_ai.operation.name"] == "text_completion"
