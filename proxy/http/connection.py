"""One client's connection: requests in, one handled at a time, answers out in order. Routes nothing.

           ┌────────────── keep-alive, or the next pipelined request ──────────────┐
           ▼                                                                       │
  HEAD ──head is whole──▶ BODY ──body is whole──▶ ANSWER ──handler ended, body read┘
                            └──handler ended first──▶ LINGER ──2 s or EOF──▶ closed

The handler runs in a task from the end of the head on and asks for the body with `Request.read`: until then no more of
it is read than came along, so that a request can be refused before its megabytes are received. When the client leaves,
in any phase, that task is cancelled. Bodies of a known length are read into their place, without a copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from email.utils import formatdate
from enum import Enum, auto
from time import time as wall_clock  # noqa: TID251 - the Date header is a wall clock's
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs

from proxy.http.content import unpack
from proxy.http.framing import END, Chunks, check_beginning, parse_head
from proxy.http.message import Data, Head, Headers, HttpError, Response, head_bytes, status_line

if TYPE_CHECKING:
    from proxy.http.server import Server

log = logging.getLogger(__name__)

_PLACED = 64 << 10  # bytes; a longer body is read into its place
_ALLOCATED = 8 << 20  # at once: a larger body gets its memory as it arrives, not because it was announced
_EARLY = 64 << 10  # bytes of pipelined requests kept while one is answered
_SMALL = 64 << 10  # an answer's body up to this is copied behind its head, to be one write
_OFF_LOOP = 64 << 10  # bytes; unpacking more takes milliseconds
_LINGER_S = 2.0  # for a client to read an answer that came before the end of its body; closing at once would reset it
_NEVER = float("inf")
_BODILESS = frozenset({204, 304})


class Phase(Enum):
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    LINGER = auto()


class Request:
    """One request, and the way to answer it. Handlers either return a Response or call begin, write and end."""

    __slots__ = ("_connection", "_error", "_waiter", "body", "chunks", "complete", "cut", "head", "started")

    def __init__(self, connection: Connection, head: Head) -> None:
        self._connection = connection
        self.head = head
        self.body: Data = b""
        self.chunks: Chunks | None = None
        self.complete = False  # the body is there
        self.started = False  # an answer has begun
        self.cut = False  # it was cancelled because the server's time is over, not because its client has left
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path}>"

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def headers(self) -> Headers:
        return self.head.headers

    @property
    def peer(self) -> str:
        """The address of the other end; empty where it has none."""
        return self._connection.peer

    @property
    def query(self) -> dict[str, str]:
        """The first value of each name."""
        return {name: values[0] for name, values in parse_qs(self.head.query).items()}

    @property
    def length(self) -> int | None:
        """Of the body as it comes, in bytes; None if only its end will tell."""
        return self.head.length

    async def read(self) -> Data:
        """The whole body, unpacked. Raises HttpError."""
        limit = self._connection.limits.body_bytes
        if (self.head.length or 0) > limit:
            raise HttpError(413, f"the body is larger than {limit} bytes", "body_too_large")
        if self._error is not None:
            raise self._error
        if not self.complete:
            self._waiter = asyncio.get_running_loop().create_future()
            self._connection.want_body()
            try:
                await self._waiter
            finally:
                self._waiter = None
        coding = self.headers.get("content-encoding")
        if coding is None:
            return self.body
        packed, self.body = self.body, b""
        if len(packed) > _OFF_LOOP:
            self.body = await asyncio.to_thread(unpack, packed, coding, limit)
        else:
            self.body = unpack(packed, coding, limit)
        return self.body

    def arrived(self, error: HttpError | None = None) -> None:
        """The body is whole, or never will be."""
        self.complete, self._error = error is None, error
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)

    # ---- the answer

    @property
    def paused(self) -> bool:
        """The client does not take its answer as fast as it comes."""
        return self._connection.paused

    def throttle(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """While this request is answered, call `pause` when `paused` becomes true and `resume` when it is over."""
        self._connection.throttle = pause, resume
        if self.paused:
            pause()

    def begin(self, status: int, headers: Mapping[str, str], length: int | None = None, data: bytes = b"") -> None:
        """The head of an answer of `length` bytes, or of one that `end` ends; and the first of its body."""
        self._connection.begin(self, status, headers, length, data)

    def write(self, data: bytes) -> None:
        """More of the body, at once; nothing is dropped while `paused`."""
        self._connection.write_body(data)

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        """Takes chunks of the body with their frames, as they came from elsewhere; None if there are none here."""
        return self._connection.chunk_writer()

    def end(self) -> None:
        self._connection.end_body()


class Connection(asyncio.BufferedProtocol):
    """Its `deadline` is the loop's time after which `late` is to be called."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._phase = Phase.HEAD
        self._buffer = b""  # of the head, or of early requests
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = False  # the task has
        self._place: bytearray | None = None  # of a long body
        self._filled = 0
        self._wanted = False  # the handler asked for the body
        self._reading = True
        self._keep_alive = True
        self._chunked = False  # the answer is
        self._headless = False  # the answer has no body on the wire
        self._ended = False  # the answer is whole
        self.paused = False
        self._unsent = 0  # bytes, when the client began to be waited for
        self.throttle: tuple[Callable[[], None], Callable[[], None]] | None = None
        self.deadline = _NEVER

    def __repr__(self) -> str:
        return f"<Connection {self._phase.name} {self._request!r}>"

    @property
    def peer(self) -> str:
        """The address of the other end; empty once it is gone, or where it has none."""
        name = None if self._transport is None else self._transport.get_extra_info("peername")
        return str(name[0]) if isinstance(name, tuple) else ""

    @property
    def busy(self) -> bool:
        return self._task is not None

    # ---- life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._server.opened(self)
        self.deadline = self._loop.time() + self.limits.idle_seconds

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.deadline = _NEVER
        self.throttle = None
        if self._task is not None:
            self._task.cancel()
        if self._task is None or not self._started:  # cancelled before its first step, a task runs no `finally`
            self._task = None
            self._server.closed(self)

    def wind_down(self) -> None:
        """What is in work is the last that is answered here."""
        self._keep_alive = False

    def leave_idle(self) -> None:
        """Close, unless something is in work, or has begun to arrive."""
        if self._phase is Phase.HEAD and not self._buffer and self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Have what is in work come to its end now."""
        if self._request is not None and self._task is not None:
            self._request.cut = True
            self._task.cancel()
        else:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    def late(self) -> None:
        """The client has let us wait too long."""
        self.deadline = _NEVER
        if self._phase is Phase.HEAD and self._buffer:
            self._refuse(HttpError(408, "the request did not come to its end in time", "request_timeout"))
        elif self._phase is Phase.BODY and self._request is not None:
            self._fail_body(HttpError(408, "the body did not come to its end in time", "request_timeout"))
        elif self.paused and self._transport is not None and self._transport.get_write_buffer_size() < self._unsent:
            self._await_writes()
        elif self._transport is not None:
            self._transport.abort()

    # ---- in

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        place = self._place
        if place is None or self._phase is not Phase.BODY:
            return self._server.scratch
        if self._filled == len(place):
            assert self._request is not None and self._request.length is not None
            place.extend(bytes(min(self._request.length - len(place), len(place))))
        return memoryview(place)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._place is not None and self._phase is Phase.BODY:
            self._filled += nbytes
            self._placed()
        else:
            self._received(bytes(self._server.scratch[:nbytes]))

    def eof_received(self) -> bool:
        """Whoever closes one half has left: the transport closes the other, and connection_lost follows."""
        return False

    def _received(self, data: bytes) -> None:
        phase = self._phase
        if phase is Phase.HEAD:
            self._read_head(self._buffer + data if self._buffer else data)
        elif phase is Phase.BODY:
            self._read_body(data)
        elif phase is Phase.ANSWER:
            self._buffer += data
            if len(self._buffer) > _EARLY:
                self._pause_reading()

    def _read_head(self, data: bytes) -> None:
        while data.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request line
            data = data[2:]
        end = data.find(END)
        if end < 0 or end + 4 > self.limits.head_bytes:
            self._wait_for_head(data)
            return
        try:
            head = parse_head(data[: end + 4] if end + 4 < len(data) else data)
        except HttpError as error:
            self._refuse(error)
            return
        self._buffer = b""
        self._request = Request(self, head)
        self._keep_alive = head.keep_alive
        if self._server.draining:
            self._keep_alive = False
            self._server.late += 1
        self._begin_body(self._request, data[end + 4 :])
        if self._transport is not None and self._phase in (Phase.BODY, Phase.ANSWER):
            # Kept here, cancelled when the client leaves; the server waits for its end.
            self._started = False
            self._task = self._loop.create_task(self._run(self._request))

    def _wait_for_head(self, data: bytes) -> None:
        try:
            if len(data) > self.limits.head_bytes:
                raise HttpError(431, f"the head is larger than {self.limits.head_bytes} bytes", "headers_too_large")
            if b"\n" in data:
                check_beginning(data)
        except HttpError as error:
            self._refuse(error)
            return
        if data and not self._buffer:
            self.deadline = self._loop.time() + self.limits.head_seconds
        self._buffer = data

    def _begin_body(self, request: Request, data: bytes) -> None:
        length = request.head.length
        self._wanted = False
        self.deadline = _NEVER
        if length is None:
            request.chunks = Chunks(self.limits.body_bytes)
            self._phase = Phase.BODY
            if data:
                self._read_chunks(request, request.chunks, data)
        elif length <= len(data):
            request.body, self._buffer = data[:length], data[length:]
            self._body_done(request)
        else:
            self._phase = Phase.BODY
            request.body = data
            if length > self.limits.body_bytes:
                return  # never read; the handler is told when it asks
            self._filled = len(data)
        if self._phase is Phase.BODY:
            self._pause_reading()

    def want_body(self) -> None:
        """The handler waits for the rest of the body."""
        request = self._request
        if request is None or self._phase is not Phase.BODY or self._wanted:
            return
        self._wanted = True
        length = request.head.length
        if length is not None and length > _PLACED:
            self._place = bytearray(min(length, _ALLOCATED))
            self._place[: self._filled] = request.body
        if request.head.expects and not self._filled and not request.body and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.deadline = self._loop.time() + self.limits.body_seconds
        self._resume_reading()

    def _placed(self) -> None:
        request = self._request
        assert request is not None and self._place is not None
        self.deadline = self._loop.time() + self.limits.body_seconds
        if self._filled == request.length:
            request.body, self._place = self._place, None
            self._body_done(request)

    def _read_body(self, data: bytes) -> None:
        request = self._request
        assert request is not None
        self.deadline = self._loop.time() + self.limits.body_seconds
        if request.chunks is not None:
            self._read_chunks(request, request.chunks, data)
            return
        length = request.head.length or 0
        body = bytes(request.body) + data
        self._filled = len(body)
        if len(body) < length:
            request.body = body
        else:
            request.body, self._buffer = body[:length], body[length:]
            self._body_done(request)

    def _read_chunks(self, request: Request, chunks: Chunks, data: bytes) -> None:
        try:
            chunks.feed(data)
        except HttpError as error:
            self._fail_body(error)
            return
        if chunks.done:
            request.body, self._buffer = chunks.body, chunks.rest
            request.chunks = None
            self._body_done(request)

    def _body_done(self, request: Request) -> None:
        self._phase = Phase.ANSWER
        self.deadline = _NEVER
        request.arrived()

    def _fail_body(self, error: HttpError) -> None:
        """The handler answers, if it waits; the connection cannot go on behind a body without an end."""
        self._keep_alive = False
        self._pause_reading()
        self.deadline = _NEVER
        request = self._request
        if request is None or self._task is None:
            self._refuse(error)
        else:
            request.chunks = None
            request.arrived(error)

    # ---- handling

    async def _run(self, request: Request) -> None:
        self._started = True
        try:
            response = await self._server.handle(request)
            if response is not None:
                self._respond(request, response)
        except asyncio.CancelledError as left:  # so has the client, or the server stops: what is open is cut below
            left.__traceback__ = None  # frames of task groups hold it in turn: a circle with all that the request had
        finally:
            self._task = None
            self._handled()

    def _handled(self) -> None:
        """The next request, or the end of the connection."""
        self.throttle = None
        request, self._request = self._request, None
        if self._transport is None or request is None:
            self._server.closed(self)
            return
        ended, self._ended = self._ended, False
        if not ended:
            self._transport.abort()  # the client must see that its answer is not whole
        elif not request.complete:
            self._linger()
        elif not self._keep_alive:
            self._transport.close()
        else:
            self._phase = Phase.HEAD
            self._resume_reading()
            self.deadline = self._loop.time() + self.limits.idle_seconds
            if self._buffer:
                early, self._buffer = self._buffer, b""
                self._read_head(early)

    def _refuse(self, error: HttpError) -> None:
        """Answer what never became a request, and leave."""
        self._keep_alive = False
        request = Request(self, Head("GET", "", "", Headers(), 0, False))
        self._respond(request, self._server.refuse(error))
        self._ended = False
        self._linger()

    def _linger(self) -> None:
        self._phase = Phase.LINGER
        self._place, self._buffer, self._request = None, b"", None
        self.deadline = self._loop.time() + _LINGER_S
        self._resume_reading()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def _pause_reading(self) -> None:
        if self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    # ---- out

    def _respond(self, request: Request, response: Response) -> None:
        if request.started:
            raise RuntimeError("a second answer to one request")
        self.begin(request, response.status, response.headers, len(response.body), response.body)
        self.end_body()

    def begin(self, request: Request, status: int, headers: Mapping[str, str], length: int | None, data: bytes) -> None:
        request.started = True
        head = request.head
        self._headless = head.method == "HEAD" or status in _BODILESS
        self._chunked = False
        if not request.complete:
            self._keep_alive = False
        if length is not None:
            framing = f"content-length: {length}\r\n"
        elif head.old:
            framing, self._keep_alive = "", False
        else:
            framing, self._chunked = "transfer-encoding: chunked\r\n", not self._headless
        if not self._keep_alive:
            framing += "connection: close\r\n"
        elif head.old:
            framing += "connection: keep-alive\r\n"
        out = head_bytes(status_line(status), headers, framing + _date(self._loop.time()))
        if data and not self._headless:
            if len(data) > _SMALL:
                self._write(out)
                self.write_body(data)
                return
            out += b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        self._write(out)

    def write_body(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or self._headless or not data:
            return
        if not self._chunked:
            transport.write(data)
        elif len(data) <= _SMALL:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))

    def chunk_writer(self) -> Callable[[bytes], None] | None:
        return self._write if self._chunked else None

    def end_body(self) -> None:
        if self._chunked:
            self._write(b"0\r\n\r\n")
        self._ended = True

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def pause_writing(self) -> None:
        self.paused = True
        self._await_writes()
        if self.throttle is not None:
            self.throttle[0]()

    def _await_writes(self) -> None:
        if self._transport is not None:
            self._unsent = self._transport.get_write_buffer_size()
            self.deadline = self._loop.time() + self.limits.write_seconds

    def resume_writing(self) -> None:
        self.paused = False
        if self._phase is Phase.ANSWER:
            self.deadline = _NEVER
        if self.throttle is not None:
            self.throttle[1]()


_dated = (-1.0, "")


def _date(now: float) -> str:
    """The Date line, made anew each second of the loop's time."""
    global _dated
    if now - _dated[0] > 1.0 or now < _dated[0]:
        _dated = (now, f"date: {formatdate(wall_clock(), usegmt=True)}\r\n")
    return _dated[1]
