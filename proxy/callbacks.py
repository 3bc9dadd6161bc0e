"""The metaserver: a decode engine asks here for the prefill of a request that it has made room for (push).

The request's own task runs the prefill, so that a client's disconnect ends it; the callback only waits for that. An
engine makes several sequences of a request with several prompts or choices, and calls for each of them.

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

from proxy.core import Instance, Stage
from proxy.errors import BadRequest, Conflict, NotFound, ProxyError, StageTimeout
from proxy.http.message import JSON, Response
from proxy.http.server import Request
from proxy.places import NO_PLACES, Places, Taken
from proxy.tasks import Owed
from proxy.workers.siblings import Kind, Siblings

ROUTE = "/v1/metaserver"
# Of the n-th choice and the m-th prompt: 1_chatcmpl-<id>, cmpl-<id>-0, 1_cmpl-<id>-0. Whoever fails to take off the
# engine's own end has eight more digits.
_ENGINE_ID = re.compile(r"(?:(?P<choice>\d+)_)?(?:chatcmpl-(?P<chat>.+)|cmpl-(?P<text>.+)-(?P<prompt>\d+))")
_ENGINES_END = re.compile(r"-[0-9a-f]{8}$")
_WILDCARDS = ("", "0.0.0.0", "::")


class PrefillCall:
    """A decode engine's call for the prefill of one sequence; it waits for the end of that."""

    def __init__(self, descriptor: Mapping[str, Any], alone: bool) -> None:
        self.descriptor = descriptor
        self.alone = alone  # the request's answer has one sequence
        self._ended: asyncio.Future[ProxyError | None] = asyncio.get_running_loop().create_future()

    def finish(self, error: ProxyError | None) -> None:
        """The prefill ended, well or not; later calls change nothing."""
        if not self._ended.done():
            self._ended.set_result(error)

    async def over(self) -> None:
        """Wait for the end. Raises the prefill's error."""
        error = await asyncio.shield(self._ended)
        if error is not None:
            raise error


class Waiting:
    """A request that waits for its decode engine's calls: one for each sequence of its answer."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._calls: dict[Any, PrefillCall] = {}
        self._unanswered: asyncio.Queue[PrefillCall] = asyncio.Queue()

    def expects(self, choice: str | None, prompt: str | None) -> bool:
        """Whether the sequence of these numbers, as engines write them, can be one of this request."""
        return self._sequences > 1 or (choice is None and prompt in (None, "0"))

    async def call(self) -> PrefillCall:
        """The next call."""
        return await self._unanswered.get()

    def finish(self, error: ProxyError) -> None:
        """The request ended."""
        for call in self._calls.values():
            call.finish(error)

    async def prefill(self, descriptor: Mapping[str, Any]) -> None:
        """Have the prefill run and wait for its end. Raises its error, or Conflict if it was asked for before."""
        sequence = descriptor.get("request_id")
        if sequence in self._calls or len(self._calls) == self._sequences:
            raise Conflict("this request's prefill has been asked for already")
        call = self._calls[sequence] = PrefillCall(descriptor, self._sequences == 1)
        self._unanswered.put_nowait(call)
        await call.over()


class Metaserver:
    """The waiting requests by id, and the address under which engines find this proxy."""

    def __init__(
        self, host: str, url: str | None = None, siblings: Siblings | None = None, scheme: str = "http"
    ) -> None:
        """`host`: what is listened on, by `scheme`. `url`: where that is reached; None: at the address that leads to
        each engine."""
        self._scheme = scheme
        self._host = host
        self._url = url
        self._siblings = siblings
        self._waiting: dict[str, Waiting] = {}
        self._reached_at: dict[str, str] = {}
        self.owed = Owed()  # prefills whose requests are gone
        self._places: dict[str, Places] = {}  # by the decode engine's URL
        self.port = 0  # known once the server is bound

    def __len__(self) -> int:
        return len(self._waiting)

    async def places(self, instance: Instance, limit: int | None, count: int, patience: float) -> Taken:
        """Wait until `instance` has room for `count` more calls of its at most `limit`, of which this worker has its
        share. Raises StageTimeout after `patience` seconds."""
        if limit is None:
            return NO_PLACES
        workers = 1 if self._siblings is None else 1 + len(self._siblings.others)
        places = self._places.setdefault(instance.url, Places(max(1, limit // workers)))
        try:
            async with asyncio.timeout(patience):
                return await places.take(count)
        except TimeoutError:
            raise StageTimeout(f"too many wait for {instance.netloc} to be prefilled", stage=Stage.DECODE) from None

    @contextmanager
    def expect(self, request_id: str, sequences: int = 1) -> Iterator[Waiting]:
        """Within, callbacks for `request_id` find its request; afterwards they get 404, and running ones an error."""
        if request_id in self._waiting:
            raise Conflict(f"a request with the id {request_id!r} is in flight")
        waiting = self._waiting[request_id] = Waiting(sequences)
        try:
            yield waiting
        finally:
            del self._waiting[request_id]
            waiting.finish(ProxyError("the request ended before its prefill", code="request_ended"))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What is owed ends with it."""
        try:
            yield
        finally:
            await self.owed.stop()

    def find(self, engine_id: Any) -> Waiting:
        """The request behind an engine's own id for one of its sequences. Raises NotFound."""
        for name in (engine_id, _ENGINES_END.sub("", engine_id)) if isinstance(engine_id, str) else ():
            match = _ENGINE_ID.fullmatch(name)
            waiting = self._waiting.get(match["chat"] or match["text"]) if match else None
            if match and waiting is not None and waiting.expects(match["choice"], match["prompt"]):
                return waiting
        raise NotFound(f"no request {engine_id!r} waits for a prefill here", param="request_id")

    async def url_for(self, instance: Instance) -> str:
        """The metaserver's URL as this instance can reach it; it leads to this worker, whoever gets the call."""
        url = self._url or await self._found_url(instance)
        if self._siblings is None:
            return url
        return f"{url}{'&' if '?' in url else '?'}worker={self._siblings.worker}"

    async def _found_url(self, instance: Instance) -> str:
        if self._host not in _WILDCARDS:
            return self._at(self._host)
        if instance.url not in self._reached_at:
            self._reached_at[instance.url] = self._at(await local_address(instance.url))
        return self._reached_at[instance.url]

    def _at(self, host: str) -> str:
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{ROUTE}"

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
            return await siblings.ask(named[0], Kind.CALLBACK, body)
        for other in siblings.others:
            with suppress(NotFound):
                status, answer = await siblings.ask(other, Kind.CALLBACK, body)
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


async def local_address(url: str) -> str:
    """The address of this machine that packets to `url` leave from: what listens on 0.0.0.0 is reached there."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
