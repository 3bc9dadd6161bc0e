"""The metaserver: a decode engine asks here for the prefill of a request that it has made room for (push).

The request's own task runs the prefill, so that a client's disconnect ends it; the callback only waits for that.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.core import Instance
from proxy.errors import BadRequest, Conflict, NotFound, ProxyError
from proxy.http.message import Response, json_response
from proxy.http.server import Request

ROUTE = "/v1/metaserver"
_ENGINE_ID = re.compile(r"chatcmpl-(?P<chat>.+)|cmpl-(?P<text>.+)-0")
_WILDCARDS = ("", "0.0.0.0", "::")


class Waiting:
    """A request that waits for its decode engine's call."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._asked: asyncio.Future[Mapping[str, Any]] = loop.create_future()
        self._ended: asyncio.Future[ProxyError | None] = loop.create_future()

    @property
    def asked(self) -> bool:
        return self._asked.done()

    async def descriptor(self) -> Mapping[str, Any]:
        """What the decode engine sent."""
        return await self._asked

    def finish(self, error: ProxyError | None) -> None:
        """The prefill ended, well or not; later calls change nothing."""
        if not self._ended.done():
            self._ended.set_result(error)

    async def prefill(self, descriptor: Mapping[str, Any]) -> None:
        """Have the prefill run and wait for its end. Raises its error, or Conflict if it was asked for before."""
        if self._asked.done():
            raise Conflict("this request's prefill has been asked for already")
        self._asked.set_result(descriptor)
        error = await asyncio.shield(self._ended)
        if error is not None:
            raise error


class Metaserver:
    """The waiting requests by id, and the address under which engines find this proxy."""

    def __init__(self, host: str, url: str | None = None) -> None:
        self._host = host
        self._url = url
        self._waiting: dict[str, Waiting] = {}
        self._reached_at: dict[str, str] = {}
        self.port = 0  # known once the server is bound

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def expect(self, request_id: str) -> Iterator[Waiting]:
        """Within, a callback for `request_id` finds its request; afterwards it gets 404, and a running one an error."""
        if request_id in self._waiting:
            raise Conflict(f"a request with the id {request_id!r} is in flight")
        waiting = self._waiting[request_id] = Waiting()
        try:
            yield waiting
        finally:
            del self._waiting[request_id]
            waiting.finish(ProxyError("the request ended before its prefill", code="request_ended"))

    def find(self, engine_id: Any) -> Waiting:
        """The request behind an engine's own id for it, `chatcmpl-<id>` or `cmpl-<id>-0`. Raises NotFound."""
        match = _ENGINE_ID.fullmatch(engine_id) if isinstance(engine_id, str) else None
        waiting = self._waiting.get(match["chat"] or match["text"]) if match else None
        if waiting is None:
            raise NotFound(f"no request {engine_id!r} waits for a prefill here", param="request_id")
        return waiting

    async def url_for(self, instance: Instance) -> str:
        """The metaserver's URL as this instance can reach it."""
        if self._url:
            return self._url
        if self._host not in _WILDCARDS:
            return _url(self._host, self.port)
        if instance.url not in self._reached_at:
            self._reached_at[instance.url] = _url(await _local_address(instance.url), self.port)
        return self._reached_at[instance.url]

    async def handle(self, request: Request) -> Response:
        """POST /v1/metaserver: answers once the prefill engine is done. Raises ProxyError."""
        try:
            descriptor = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        if not isinstance(descriptor, dict):
            raise BadRequest("the body must be a JSON object")
        await self.find(descriptor.get("request_id")).prefill(descriptor)
        return json_response({"status": "ok"})


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{ROUTE}"


async def _local_address(url: str) -> str:
    """The address of this machine that packets to `url` leave from: what listens on 0.0.0.0 is reached there."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
