"""One client connection: a POST at a time, what came back and when, and how it ended. Judges nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import cast
from urllib.parse import urlsplit

from bench.scripted.framing import HEAD_END, Body, Headers, ToClose, body_of, parse_head

_SMALL = 1 << 16  # a body up to this goes out in one write with its head


class Ending(Enum):
    COMPLETE = auto()  # the answer was framed to its end
    BROKEN = auto()  # the connection ended first, or what came is not HTTP
    HUNG = auto()  # neither within the client's patience
    LEFT = auto()  # the client hung up, as it was told to


@dataclass(slots=True)
class Answer:
    """What a client saw. Times are those of `time.monotonic`; `first` is the body's first byte, None without one."""

    sent: float
    status: int = 0
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    first: float | None = None
    ended: float = 0.0
    ending: Ending = Ending.BROKEN

    @property
    def first_byte(self) -> float:
        """Seconds from the request to the body's first byte."""
        return float("inf") if self.first is None else self.first - self.sent


class Client(asyncio.Protocol):
    """Reconnects where the last answer closed the connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._host = parts.netloc.encode()
        self._transport: asyncio.Transport | None = None
        self._answer = Answer(0.0)
        self._waiter: asyncio.Future[Ending] | None = None
        self._buffer = b""
        self._body: Body | None = None  # None: the head is not there yet
        self._pieces: list[bytes] = []

    async def connect(self) -> None:
        """Raises OSError."""
        if self._transport is None:
            await asyncio.get_running_loop().create_connection(lambda: self, *self._address)

    async def post(
        self, path: str, body: bytes, *, timeout: float, leave_after: float | None = None, request_id: str = ""
    ) -> Answer:
        """Send and wait for the end of the answer, for `timeout` seconds; hang up after `leave_after`."""
        loop = asyncio.get_running_loop()
        self._answer = Answer(time.monotonic())
        try:
            async with asyncio.timeout(timeout):
                await self.connect()
        except (OSError, TimeoutError):
            self._answer.ended = time.monotonic()
            return self._answer
        self._buffer, self._body, self._pieces = b"", None, []
        self._waiter = loop.create_future()
        self._send(path, body, request_id)
        left = leave_after is not None and leave_after < timeout
        timer = loop.call_later(leave_after if left and leave_after is not None else timeout, self._give_up, left)
        try:
            self._answer.ending = await self._waiter
        finally:
            timer.cancel()
        self._answer.ended = time.monotonic()
        self._answer.body = b"".join(self._pieces)
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _send(self, path: str, body: bytes, request_id: str) -> None:
        assert self._transport is not None
        named = b"x-request-id: %b\r\n" % request_id.encode() if request_id else b""
        head = b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n" % (
            *(path.encode(), self._host, named, len(body)),
        )
        self._answer.sent = time.monotonic()
        if len(body) <= _SMALL:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def _give_up(self, left: bool) -> None:
        self._end(Ending.LEFT if left else Ending.HUNG)

    def _end(self, ending: Ending) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(ending)
        if ending is not Ending.COMPLETE or self._answer.headers.get("connection", "").lower() == "close":
            self.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        whole = isinstance(self._body, ToClose) and exc is None
        self._end(Ending.COMPLETE if whole else Ending.BROKEN)

    def data_received(self, data: bytes) -> None:
        try:
            if self._body is None:
                data = self._read_head(self._buffer + data)
            if self._body is not None and data:
                self._answer.first = self._answer.first or time.monotonic()
                self._pieces.append(self._body.feed(data))
        except ValueError:
            self._end(Ending.BROKEN)
            return
        if self._body is not None and self._body.done:
            self._end(Ending.COMPLETE)

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head, once that is whole."""
        end = data.find(HEAD_END)
        if end < 0:
            self._buffer = data
            return b""
        first, self._answer.headers = parse_head(data[:end])
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not HTTP: {first[:40]!r}")
        self._answer.status = int(rest[:3])
        if self._answer.status == 100:
            self._buffer = b""
            return self._read_head(data[end + len(HEAD_END) :])
        self._body = body_of(self._answer.headers, ToClose())
        return data[end + len(HEAD_END) :]
