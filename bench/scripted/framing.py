"""HTTP/1.1 framing for both ends of a benchmark: a head, and a body by length, in chunks, or to the close.

Trusts what it reads: it is fed by our own programs, and by proxies whose faults show in the answers' verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

HEAD_END = b"\r\n\r\n"

Headers = dict[str, str]


class Body(Protocol):
    """Payload out of bytes cut anywhere."""

    done: bool
    """The last byte of the body has been fed."""
    rest: bytes
    """What was fed beyond it."""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises ValueError for framing that is none."""


def parse_head(head: bytes) -> tuple[str, Headers]:
    """The first line, and the headers with lower-case names, of a head without its blank line."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return first, {name.lower(): value.strip() for name, _, value in fields}


def body_of(headers: Mapping[str, str], otherwise: Body) -> Body:
    """How the body of a message with these headers is framed; `otherwise` where they do not say."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return Chunked()
    return Sized(int(headers["content-length"])) if "content-length" in headers else otherwise


class Sized:
    """Exactly `size` bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.done = size == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            data, self.rest = data[: self._left], data[self._left :]
        self._left -= len(data)
        self.done = self._left == 0
        return data


class ToClose:
    """All there is until the other side closes; never done by itself."""

    done = False
    rest = b""

    def feed(self, data: bytes) -> bytes:
        return data


class Chunked:
    """Chunks, their extensions and trailers ignored."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0  # of the current chunk, its CRLF included
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        payload: list[bytes] = []
        at = 0
        while at < len(data) and not self.done:
            if self._left == 0:
                at = self._size_line(data, at)
                continue
            taken = data[at : at + self._left]
            payload.append(taken[: max(0, self._left - 2)])
            self._left -= len(taken)
            at += len(taken)
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _size_line(self, data: bytes, at: int) -> int:
        """Where the chunk behind the size line at `at` begins; the end of `data` if the line is not whole."""
        end = data.find(b"\r\n", at)
        size = int(data[at:end].partition(b";")[0], 16) if end >= 0 else -1
        last = data.find(HEAD_END, end) if size == 0 else -1
        if size > 0:
            self._left = size + 2
            return end + 2
        if last >= 0:
            self.done, self.rest = True, data[last + len(HEAD_END) :]
        else:
            self._buffer = data[at:]
        return len(data)


def chunk(data: bytes) -> bytes:
    """`data` as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
