"""The metaserver: a decode engine asks here for the prefill of a request that it has made room for (push).

The request's own task runs the prefill, so that a client's disconnect ends it; the callback only waits for that.

With several workers on one address, any of them may get the call: the URL says whose it is, and the others pass it on.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import orjson

from proxy.core import Instance
from proxy.errors import BadRequest, Conflict, NotFound, ProxyError
from proxy.http.message import JSON, Response
from proxy.http.server import Request
from proxy.siblings import Siblings

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

    def __init__(self, host: str, url: str | None = None, siblings: Siblings | None = None) -> None:
        self._host = host
        self._url = url
        self._siblings = siblings
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

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Within, other workers can pass on what is this one's."""
        if self._siblings is None:
            yield
        else:
            async with self._siblings.listening(self.answer):
                yield

    def find(self, engine_id: Any) -> Waiting:
        """The request behind an engine's own id for it, `chatcmpl-<id>` or `cmpl-<id>-0`. Raises NotFound."""
        match = _ENGINE_ID.fullmatch(engine_id) if isinstance(engine_id, str) else None
        waiting = self._waiting.get(match["chat"] or match["text"]) if match else None
        if waiting is None:
            raise NotFound(f"no request {engine_id!r} waits for a prefill here", param="request_id")
        return waiting

    async def url_for(self, instance: Instance) -> str:
        """The metaserver's URL as this instance can reach it; it leads to this worker, whoever gets the call."""
        url = self._url or await self._found_url(instance)
        if self._siblings is None:
            return url
        return f"{url}{'&' if '?' in url else '?'}worker={self._siblings.worker}"

    async def _found_url(self, instance: Instance) -> str:
        if self._host not in _WILDCARDS:
            return _url(self._host, self.port)
        if instance.url not in self._reached_at:
            self._reached_at[instance.url] = _url(await _local_address(instance.url), self.port)
        return self._reached_at[instance.url]

    async def handle(self, request: Request) -> Response:
        """POST /v1/metaserver: answers once the prefill engine is done. Raises ProxyError."""
        body = await request.read()
        status, answer = await self.routed(bytes(body), request.query.get("worker"))
        return Response(status, answer, {"content-type": JSON})

    async def routed(self, body: bytes, worker: str | None) -> tuple[int, bytes]:
        """The answer of the worker that waits; without a worker in the URL, of the first that knows the request.

        Raises NotFound if the worker that it names has died.
        """
        siblings = self._siblings
        if siblings is None or worker == str(siblings.worker) or self._knows(body):
            return await self.answer(body)
        named = [other for other in siblings.others if str(other) == worker]
        if named:
            return await siblings.ask(named[0], body)
        for other in siblings.others:
            with suppress(NotFound):
                status, answer = await siblings.ask(other, body)
                if status != NotFound.status:
                    return status, answer
        return await self.answer(body)

    def _knows(self, body: bytes) -> bool:
        with suppress(NotFound, BadRequest):
            self.find(_descriptor(body).get("request_id"))
            return True
        return False

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and body for a callback that is this worker's own, once its prefill is done."""
        try:
            descriptor = _descriptor(body)
            await self.find(descriptor.get("request_id")).prefill(descriptor)
        except ProxyError as error:
            return error.status, error.json()
        return 200, b'{"status":"ok"}'


def _descriptor(body: bytes) -> Mapping[str, Any]:
    try:
        descriptor = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(descriptor, dict):
        raise BadRequest("the body must be a JSON object")
    return descriptor


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
