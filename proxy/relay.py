"""Bytes from an engine's answer to the client, unchanged, and not before they prove success. Knows no plans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import orjson

from proxy.core import Body, Stage
from proxy.errors import Broken, ProxyError, within_200
from proxy.http.client import Shortcut
from proxy.http.server import Request
from proxy.sse import DONE, Event, EventTooLong, Splitter
from proxy.upstream import Answer

Head = Callable[[], Mapping[str, str]]
"""Called once, when success is proven: the headers that are known by then."""

_LONGEST_CHUNK = 4096  # bytes; a longer one's frame is read


class Sink(Protocol):
    """Where an answer goes. `started` turns true with the status line; from then on there is no other answer.

    Nothing here waits: bytes leave at once or are held, and who was told to pause brings no more until resumed.
    A client that leaves cancels the request's task; what is written after that goes nowhere.
    """

    started: bool
    sent: int  # bytes of the body

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        """Send status 200, the headers, and the first bytes of the body."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    def end(self) -> None:
        """The answer is complete."""

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        """Takes whole HTTP chunks as an engine wrote them; None if this answer is not sent in chunks, or is changed."""

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Call `pause` when the client is slower than what was written, and `resume` once it has caught up."""


class ClientSink:
    """A sink on a client's request."""

    __slots__ = ("_id", "_request", "sent", "started")

    def __init__(self, request: Request, request_id: str) -> None:
        self._request = request
        self._id = request_id
        self.started = False
        self.sent = 0

    def begin(self, content_type: str, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        named = {"content-type": content_type, "x-request-id": self._id, **headers}
        if length is None:
            named["cache-control"] = "no-cache"
        self.started = True
        self.sent += len(data)
        self._request.begin(200, named, length, data)

    def write(self, data: bytes) -> None:
        self.sent += len(data)
        self._request.write(data)

    def end(self) -> None:
        self._request.end()

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        return self._request.chunk_writer()

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._request.throttle(pause, resume)


async def whole(answer: Answer, sink: Sink, head: Head, stage: Stage) -> Body:
    """Relay an unstreamed answer, and return it. Raises Broken if it is none, Refused if it is an error with status
    200."""
    body = await answer.read()
    parsed = _object(body, stage)
    if "error" in parsed:
        raise within_200(parsed, stage=stage)
    choices = parsed.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Broken(f"the {stage} engine's answer has no choices", stage=stage)
    sink.begin("application/json", head(), len(body), body)
    sink.end()
    return parsed


async def stream(answer: Answer, sink: Sink, head: Head, stage: Stage, idle_timeout: float) -> float:
    """Relay an event stream to its [DONE], whole events at a time, each in the moment it arrives.

    Once success is proven, every wait for the engine, and none for the client, is bounded by `idle_timeout`. Raises
    Broken, or Refused for an error event, which is not relayed: after the first byte the caller tells the client in
    the same way as of any other failure.

    Returns how many tokens have come after the first, by their bytes; 0 where that says nothing of the engine's pace,
    as the client was slower, or the stream went on from another's.
    """
    content_type = answer.header("content-type")
    if not content_type.startswith("text/event-stream"):
        raise Broken(f"the {stage} engine answered a stream with {content_type or 'no content type'}", stage=stage)
    flow = _Flow(answer, sink, head, StreamCheck(stage), idle_timeout)
    try:
        sink.throttle(flow.pause, answer.resume)
        answer.pipe(flow.feed, flow.broken)
        await flow.over()
    finally:
        flow.stop()
    sink.end()
    answer.enough = True
    return flow.tokens


class _Flow:
    """A stream on its way: `feed` runs where the engine's bytes arrive and writes them on; no task between."""

    def __init__(self, answer: Answer, sink: Sink, head: Head, check: StreamCheck, idle_timeout: float) -> None:
        self._answer = answer
        self._sink = sink
        self._head = head
        self._check = check
        self._idle_timeout = idle_timeout
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = False
        self._error: Exception | None = None
        self._shortcut: Shortcut | None = None
        self._event = 0.0  # bytes of the events that proved success, on average; 0: none did, or they tell of no pace
        self._from = 0  # bytes sent by then

    @property
    def tokens(self) -> float:
        """After the first, as if each were an event like those that came with that."""
        return (self._sink.sent - self._from) / self._event if self._event else 0.0

    def pause(self) -> None:
        """The client is slower than the engine."""
        self._event = 0.0
        self._answer.pause()

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the engine; empty at the end."""
        if self._stopped:
            return
        check, sink = self._check, self._sink
        ready = check.feed(chunk)
        if ready:
            if sink.started:
                sink.write(ready)
            else:
                self._begin(ready)
        self._answer.shortcut(self._shortcut if check.clean else None)
        if check.done or check.error is not None:
            self._finish(check.error)

    def broken(self, error: Exception) -> None:
        """The engine's answer broke off, or came too late."""
        if not self._stopped:
            self._finish(error)

    async def over(self) -> None:
        """Until the last byte is written, or the answer broke. Raises ProxyError."""
        await self._over
        if self._error is not None:
            raise self._error

    def _finish(self, error: Exception | None) -> None:
        self._stopped, self._error = True, error
        if not self._over.done():
            self._over.set_result(None)

    def stop(self) -> None:
        self._stopped = True

    def _begin(self, ready: bytes) -> None:
        self._answer.patience(self._idle_timeout, each=True)
        self._sink.begin(self._answer.header("content-type"), self._head(), None, ready)
        self._event, self._from = len(ready) / max(1, ready.count(b"\n\n")), self._sink.sent
        self._shortcut = self._shortcut_to(self._sink)

    @staticmethod
    def _shortcut_to(sink: Sink) -> Shortcut | None:
        """Passes whole, harmless events on in the chunks that the engine made: what nearly every token is.

        For where an event begins. An event in two chunks may be anything, and is not for this.
        """
        write = sink.chunk_writer()
        if write is None:
            return None

        def shortcut(data: bytes) -> bool:
            if not data.endswith(b"\n\n\r\n") or b'"error"' in data or b"[DONE]" in data or not _is_chunks(data):
                return False
            write(data)
            sink.sent += len(data)
            return True

        return shortcut


def _is_chunks(data: bytes) -> bool:
    """Whether `data` is one or more whole chunks, each of whole events, framed as HTTP writes them."""
    if len(data) <= _LONGEST_CHUNK and data.startswith(_CHUNK_HEADS[len(data)]):
        return True
    at = 0
    while at < len(data):
        begin = data.find(b"\r\n", at, at + 8) + 2
        if begin < 2 or not (digits := data[at : begin - 2]).isalnum():
            return False
        try:
            end = begin + int(digits, 16)
        except ValueError:
            return False
        if digits != b"%x" % (end - begin) or data[end - 2 : end + 2] != b"\n\n\r\n":
            return False
        at = end + 2
    return at == len(data)


def _chunk_head(length: int) -> bytes:
    """How a chunk begins that is `length` bytes long with its frame; if there is none, what no chunk begins with."""
    for digits in range(1, 5):
        size = length - digits - 4
        if size > 0 and len(f"{size:x}") == digits:
            return b"%x\r\n" % size
    return b"\0"


_CHUNK_HEADS = tuple(map(_chunk_head, range(_LONGEST_CHUNK + 1)))


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
        if chunk.endswith(b"\n\n") and b'"error"' not in chunk and b"[DONE]" not in chunk and self.clean:
            return chunk
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

    @property
    def clean(self) -> bool:
        """Success is proven, an event has just ended, and others may follow."""
        return self._held is None and not self._splitter.rest and not self.done and self.error is None

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
        if self._held is not None and _proves(parsed, self._stage):
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


def _proves(event: Mapping[str, Any], stage: Stage) -> bool:
    """Whether an event has content. A first delta with the role alone has not: an error may still follow it. Raises
    Broken for what is no piece of an answer."""
    choices = event.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Broken(f"the {stage} engine's stream has choices that are none", stage=stage)
    for choice in choices:
        if choice.get("finish_reason") or choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role"):
            return True
    return False
