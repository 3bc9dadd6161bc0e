"""A record as OpenTelemetry spans: one of kind SERVER for the request, below it one of kind CLIENT for each leg.

Names and attributes are those of the semantic conventions for HTTP and generative AI, and `triptych.…` for what these
do not know. Imported only where traces are sent: it needs the extra `tracing`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from proxy.core import Api
from proxy.record import CANCELLED, OK, LegRecord, Record
from proxy.telemetry.trace import Trace, parsed

Attributes = dict[str, AttributeValue]

_VERSION = version("triptych")
_SCOPE = InstrumentationScope("triptych.proxy", _VERSION)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_OPERATIONS: Mapping[str, str] = {Api.CHAT: "chat", Api.COMPLETIONS: "text_completion"}
_FAILED = 500
_REFUSED = 400


class Exporter:
    """Sends spans to a collector by OTLP over HTTP. Blocks: not for the event loop."""

    def __init__(self, url: str, instance: str, timeout: float) -> None:
        """`url`: where spans are posted; `instance`: which proxy this is. OTEL_… in the environment may add to both."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # each retry of each batch would have a line
        self._otlp = OTLPSpanExporter(endpoint=url, timeout=timeout)
        ours = {"service.name": "triptych-proxy", "service.version": _VERSION, "service.instance.id": instance}
        self._resource = Resource.create(ours).merge(OTELResourceDetector().detect())

    def export(self, ended: list[tuple[Record, float]]) -> bool:
        """Whether the collector took the spans of all the records, each with what makes its times Unix time."""
        found = [span for record, epoch in ended for span in spans(record, epoch, self._resource)]
        return self._otlp.export(found) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Give up what is being sent."""
        self._otlp.shutdown()  # type: ignore[no-untyped-call]


def spans(record: Record, epoch: float, resource: Resource) -> Iterator[ReadableSpan]:
    """Of a sampled request that has ended; `epoch`: when its clock showed 0, in Unix seconds."""
    trace = record.trace
    assert trace is not None
    yield _request(record, trace, epoch, resource)
    for leg in record.legs:
        yield _leg(leg, record, trace, epoch, resource)


def _request(record: Record, trace: Trace, epoch: float, resource: Resource) -> ReadableSpan:
    refused, failed = record.status >= _REFUSED, record.status >= _FAILED
    attributes: Attributes = {
        **_both(record),
        "gen_ai.provider.name": "triptych",
        "gen_ai.request.stream": record.stream,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "http.route": record.api,
        "http.response.status_code": record.status,
        "triptych.request_id": record.id,
        "triptych.path": record.path,
        "triptych.route": record.route,
        "triptych.items": record.items,
        "triptych.attempts": record.attempts,
    }
    if record.caller:
        attributes["triptych.caller"] = record.caller
    if record.output_tokens:
        attributes["gen_ai.usage.output_tokens"] = record.output_tokens
    if record.first:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first - record.began
    if refused:
        attributes["error.type"] = record.code or str(record.status)
    return ReadableSpan(
        f"POST {record.api}",
        context=_context(trace.id, trace.span),
        parent=_context(trace.id, trace.parent, remote=True) if trace.parent else None,
        resource=resource,
        attributes=attributes,
        events=[
            Event(name, {"triptych.detail": detail} if detail else {}, _ns(at + epoch))
            for at, name, detail in _events(record)
        ],
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, record.error) if failed else Status(),
        start_time=_ns(record.began + epoch),
        end_time=_ns(record.ended + epoch),
        instrumentation_scope=_SCOPE,
    )


def _events(record: Record) -> list[tuple[float, str, str]]:
    """(when, what, more of it), in order."""
    known = [(record.admitted, "admitted", ""), (record.drawn, "planned", ""), (record.first, "first_token", "")]
    return sorted([*[event for event in known if event[0]], *record.events])


def _leg(leg: LegRecord, record: Record, trace: Trace, epoch: float, resource: Resource) -> ReadableSpan:
    made = parsed(leg.context)
    assert made is not None
    host, port = _address(leg.url)
    attributes: Attributes = {
        **_both(record),
        "server.address": host,
        "server.port": port,
        "triptych.stage": leg.stage,
        "triptych.attempt": leg.attempt,
        "triptych.items": leg.items,
        "triptych.outcome": leg.outcome,
    }
    failed = leg.outcome not in ("", OK, CANCELLED)
    if failed:
        attributes["error.type"] = leg.outcome
    first = [Event("handed_on", {}, _ns(leg.first + epoch))] if leg.first else []
    return ReadableSpan(
        str(leg.stage),
        context=_context(trace.id, made[1]),
        parent=_context(trace.id, trace.span),
        resource=resource,
        attributes=attributes,
        events=first,
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, leg.outcome) if failed else Status(),
        start_time=_ns(leg.began + epoch),
        end_time=_ns((leg.ended or record.ended) + epoch),
        instrumentation_scope=_SCOPE,
    )


def _both(record: Record) -> Attributes:
    return {
        "gen_ai.operation.name": _OPERATIONS[record.api],
        "gen_ai.request.model": record.model,
        "http.request.method": "POST",
    }


def _context(trace: int, span: int, remote: bool = False) -> SpanContext:
    return SpanContext(trace, span, remote, _SAMPLED)


@lru_cache(1024)
def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
