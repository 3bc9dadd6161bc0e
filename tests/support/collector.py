"""A collector of traces: takes what the official protobufs define, over real HTTP, and keeps it."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.waiting import until


class Collector:
    """`status` other than 200 refuses what comes from then on."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.posts = 0
        self.status = 200
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.posts += 1
        data = await request.read()
        if self.status != 200:
            return web.Response(status=self.status)
        if request.headers.get("content-encoding") == "gzip":
            data = gzip.decompress(data)
        for of_resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.resources.append(values(of_resource.resource.attributes))
            for of_scope in of_resource.scope_spans:
                self.spans.extend(of_scope.spans)
        return web.Response(content_type="application/x-protobuf")

    async def until(self, count: int) -> list[Span]:
        """Wait for as many spans: requests first, then their legs, each in the order they began."""
        await until(lambda: len(self.spans) >= count)
        return sorted(self.spans, key=lambda span: (span.kind != Span.SPAN_KIND_SERVER, span.start_time_unix_nano))


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as a mapping."""

    def value(one: KeyValue) -> Any:
        return getattr(one.value, one.value.WhichOneof("value") or "string_value")

    return {one.key: value(one) for one in attributes}


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """Listens within, on a free port."""
    made = Collector()
    app = web.Application()
    app.add_routes([web.post("/v1/traces", made.take)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield made
    finally:
        await runner.cleanup()
