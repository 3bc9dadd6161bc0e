"""The server's end of a connection: whole requests in, answers out, and a word when a caller leaves.

One exchange at a time per connection; what comes early waits. Nothing is known here of engines.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

import orjson

from bench.scripted.framing import HEAD_END, LAST_CHUNK, Body, Headers, Sized, body_of, chunk, parse_head

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends RST
_CUT_AFTER_S = 0.03
_REASONS = {status.value: status.phrase for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Headers
    body: bytes


class Connection(asyncio.Protocol):
    """Calls `handle` for each request, which the methods here answer, now or later; and `lost` at its end."""

    def __init__(self, handle: Callable[[Request, Connection], None], lost: Callable[[Connection], None]) -> None:
        self._handle = handle
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._head: tuple[str, str, Headers] | None = None
        self._body: Body = Sized(0)
        self._pieces: list[bytes] = []
        self._busy = False
        self.left: Callable[[], None] | None = None
        """Called when the caller leaves before its answer is complete."""

    # ---- in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._done()
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        if self._busy:
            self._buffer += data
        elif self._head is None:
            self._read_head(self._buffer + data)
        else:
            self._read_body(data)

    def _read_head(self, data: bytes) -> None:
        end = data.find(HEAD_END)
        if end < 0:
            self._buffer = data
            return
        self._buffer = b""
        first, headers = parse_head(data[:end])
        method, path, version = first.split(" ")
        if version != "HTTP/1.1":  # sglang-router asks once whether HTTP/2 is spoken
            self.reset()
            return
        self._head = method, path, headers
        self._body = body_of(headers, Sized(0))
        if "expect" in headers:
            self.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._read_body(data[end + len(HEAD_END) :])

    def _read_body(self, data: bytes) -> None:
        if data:
            self._pieces.append(self._body.feed(data))
        if self._body.done and self._head is not None:
            method, path, headers = self._head
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._head, self._pieces, self._buffer = None, [], self._body.rest
            self._busy = True
            self._handle(Request(method, path, headers, body), self)

    # ---- out

    def respond(self, status: int, body: object, content_type: str = JSON, extra: str = "") -> None:
        """A whole answer; `body` is bytes, or an object that becomes JSON."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        self.raw(head(status, content_type, f"Content-Length: {len(data)}\r\n{extra}") + data)
        self.finished()

    def begin(self, content_type: str = EVENTS) -> None:
        """The head of an answer in chunks."""
        self.raw(head(200, content_type, "Transfer-Encoding: chunked\r\n"))

    def write(self, data: bytes) -> None:
        self.raw(chunk(data))

    def end(self) -> None:
        self.raw(LAST_CHUNK)
        self.finished()

    def raw(self, data: bytes) -> None:
        """Bytes as they are; nothing once the caller has left."""
        if self._transport is not None:
            self._transport.write(data)

    def finished(self) -> None:
        """The answer is complete, and the next request may be read."""
        self.left, self._busy = None, False
        if self._buffer and self._transport is not None:
            early, self._buffer = self._buffer, b""
            self.data_received(early)

    def close(self) -> None:
        """End in order, whatever is missing of the answer."""
        self.left = None
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Cut, so that the caller gets a connection reset."""
        self.left = None
        if self._transport is not None:
            linger: socket.socket = self._transport.get_extra_info("socket")
            linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def cut(self) -> None:
        """Reset once what was written has gone out and been read: a reset overtakes data."""
        self.left = None
        asyncio.get_running_loop().call_later(_CUT_AFTER_S, self.reset)

    def _done(self) -> None:
        left, self.left = self.left, None
        if left is not None:
            left()


def head(status: int, content_type: str, framing: str) -> bytes:
    """An answer's head; `framing` holds whole header lines."""
    reason = _REASONS.get(status, "")
    return f"HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\n{framing}\r\n".encode()
