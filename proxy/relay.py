"""Bytes from an engine's answer to the client, unchanged, and not before they prove success. Knows no plans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson
from aiohttp import web

from proxy.core import Stage
from proxy.errors import Broken, ProxyError, within_200
from proxy.sse import DONE, Event, EventTooLong, Splitter
from proxy.upstream import Answer

Head = Callable[[], Mapping[str, str]]
"""Called once, when success is proven: the headers that are known by then."""

_DRAIN_S = 1.0  # for the end of an upstream body after [DONE], so that its connection can be used again


class ClientGone(ConnectionResetError):
    """The client closed its connection: nothing is left to answer. The server knows its base and stays quiet."""


class Sink(Protocol):
    """Where an answer goes. `started` turns true with the status line; from then on there is no other answer."""

    started: bool

    async def begin(self, content_type: str, headers: Mapping[str, str], length: int | None = None) -> None:
        """Send status 200 and the headers. Raises ClientGone."""

    async def write(self, data: bytes) -> None:
        """Send bytes; waits for a slow client. Raises ClientGone."""

    async def end(self) -> None:
        """The answer is complete. Raises ClientGone."""


class ClientSink:
    """A sink on an aiohttp request."""

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self._headers = headers
        self._response = web.StreamResponse()
        self.started = False
        self.sent = 0

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    async def begin(self, content_type: str, headers: Mapping[str, str], length: int | None = None) -> None:
        self._response.headers.update({**self._headers, **headers, "Content-Type": content_type})
        if length is None:
            self._response.headers["Cache-Control"] = "no-cache"
        else:
            self._response.content_length = length
        self.started = True
        try:
            await self._response.prepare(self._request)
        except OSError as error:
            raise ClientGone from error

    async def write(self, data: bytes) -> None:
        self.sent += len(data)
        try:
            await self._response.write(data)
        except OSError as error:
            raise ClientGone from error

    async def end(self) -> None:
        try:
            await self._response.write_eof()
        except OSError as error:
            raise ClientGone from error


async def whole(answer: Answer, sink: Sink, head: Head, stage: Stage, timer: asyncio.Timeout) -> None:
    """Relay an unstreamed answer. Raises Broken if it is none, Refused if it is an error with status 200.

    `timer` bounds the wait for the engine, none for the client: once the answer has begun, only ClientGone can come.
    """
    body = await answer.read()
    timer.reschedule(None)
    parsed = _object(body, stage)
    if "error" in parsed:
        raise within_200(parsed, stage=stage)
    if not isinstance(parsed.get("choices"), list):
        raise Broken(f"the {stage} engine's answer has no choices", stage=stage)
    await sink.begin("application/json", head(), len(body))
    await sink.write(body)
    await sink.end()


async def stream(
    answer: Answer, sink: Sink, head: Head, stage: Stage, timer: asyncio.Timeout, idle_timeout: float
) -> None:
    """Relay an event stream to its [DONE], whole events at a time.

    `timer` is the wait for the first token; from then on every wait for the engine, and none for the client, is
    bounded by `idle_timeout`. Raises Broken, or Refused for an error event, which is not relayed: after the first
    byte the caller tells the client in the same way as of any other failure.
    """
    if not answer.content_type.startswith("text/event-stream"):
        raise Broken(
            f"the {stage} engine answered a stream with {answer.content_type or 'no content type'}", stage=stage
        )
    check = StreamCheck(stage)
    while not check.done:
        ready = check.feed(await answer.chunk())
        if ready:
            timer.reschedule(None)
            if not sink.started:
                await sink.begin(answer.content_type, head())
            await sink.write(ready)
        if check.error is not None:
            raise check.error
        if sink.started:
            timer.reschedule(asyncio.get_running_loop().time() + idle_timeout)
    timer.reschedule(None)
    await sink.end()
    await _drain(answer)


async def _drain(answer: Answer) -> None:
    try:
        async with asyncio.timeout(_DRAIN_S):
            while await answer.chunk():
                pass
    except (TimeoutError, ProxyError):
        pass  # the client has everything; only the connection is lost


class StreamCheck:
    """What may be passed on of an upstream stream: nothing before content, nothing from an error on. Pure."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._splitter = Splitter()
        self._held: list[bytes] | None = []  # until something proves success
        self.done = False
        self.error: ProxyError | None = None

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that may go to the client now. An empty chunk is the end of the stream."""
        ready: list[bytes] = []
        try:
            events = self._splitter.feed(chunk) if chunk else self._splitter.end()
            for event in events:
                self._take(event, ready)
                if self.done:
                    break
            if not chunk and not self.done:
                raise Broken(f"the {self._stage} engine's stream broke off", stage=self._stage)
        except ProxyError as error:
            self.error = error
        except EventTooLong as error:
            self.error = Broken(f"the {self._stage} engine's stream: {error}", stage=self._stage)
        return b"".join(ready)

    def _take(self, event: Event, ready: list[bytes]) -> None:
        if b"[DONE]" in event.raw and event.data == DONE:
            if self._held is not None:
                raise Broken(f"the {self._stage} engine's stream ended before any content", stage=self._stage)
            self.done = True
        elif b'"error"' in event.raw or self._held is not None:
            self._inspect(event, ready)
        if self._held is None:
            ready.append(event.raw)
        else:
            self._held.append(event.raw)

    def _inspect(self, event: Event, ready: list[bytes]) -> None:
        data = event.data
        if not data:
            return  # a comment
        parsed = _object(data, self._stage)
        if parsed.get("error"):
            raise within_200(parsed, stage=self._stage)
        if self._held is not None and _proves(parsed):
            ready.extend(self._held)
            self._held = None


def _object(data: bytes, stage: Stage) -> dict[str, Any]:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Broken(f"the {stage} engine answered 200 with something that is not a JSON object", stage=stage)
    return parsed


def _proves(event: Mapping[str, Any]) -> bool:
    """Whether an event has content. A first delta with the role alone has not: an error may still follow it."""
    for choice in event.get("choices") or ():
        if choice.get("finish_reason") or choice.get("text"):
            return True
        delta = choice.get("delta") or {}
        if any(value for name, value in delta.items() if name != "role"):
            return True
    return False
