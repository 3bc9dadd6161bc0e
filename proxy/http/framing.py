"""Where a request's head and body end, read strictly: what two readers could understand in two ways is refused.

llhttp (in httptools) judges the head, unless it is written so plainly that there is nothing to judge; chunks are read
here, since llhttp does not tell where a chunked body ends and a pipelined request begins. No I/O.
"""

from __future__ import annotations

import re

import httptools

from proxy.http.message import Head, Headers, HttpError

END = b"\r\n\r\n"
MAX_HEADERS = 256
_FIRST_LINE = re.compile(rb"[A-Z]{1,20} \S+ HTTP/1\.([01])\Z")
_PLAIN = re.compile(rb"(GET|POST) (/[!-~]*) HTTP/1\.1((?:\r\n[A-Za-z0-9-]+: [!-~][ -~]*){1,64})\r\n\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?\Z")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\Z")
_LONGEST_LENGTH = 15  # digits
_LONGEST_LINE = 4096
_LONGEST_TRAILERS = 16384


class _Fields:
    """llhttp's callbacks."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def parse_head(data: bytes) -> Head:
    """The head in `data`, which ends with its empty line. Raises HttpError."""
    plain = _PLAIN.fullmatch(data)
    if plain is not None and (head := _plain_head(plain)) is not None:
        return head
    return judged_head(data)


def _plain_head(match: re.Match[bytes]) -> Head | None:
    """What nearly all clients send: no field twice, no coding, a length in digits. None if it is not that after all."""
    method, target, fields = match.groups()
    lines = fields.decode("ascii").split("\r\n")
    headers = Headers()
    for line in lines[1:]:
        name, _, value = line.partition(": ")
        headers[name.lower()] = value.rstrip(" ")
    length = headers.get("content-length", "0")
    if (
        len(headers) != len(lines) - 1
        or not length.isdigit()
        or len(length) > _LONGEST_LENGTH
        or "host" not in headers
        or "transfer-encoding" in headers
        or "upgrade" in headers
        or "expect" in headers
    ):
        return None
    path, _, query = target.decode("ascii").partition("?")
    return Head(method.decode("ascii"), path, query, headers, int(length), _keeps_alive(headers, old=False))


def judged_head(data: bytes) -> Head:
    """The same by llhttp. Raises HttpError."""
    first = data[: data.find(b"\r")]
    if not first.rpartition(b" ")[2].startswith(b"HTTP/1."):
        raise HttpError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here", "http_version")
    parser = _parse(fields := _Fields(), data)
    found = _FIRST_LINE.match(first)
    if found is None:
        raise HttpError(400, "not HTTP: bad request line")
    headers = _headers(fields.fields)
    old = found[1] == b"0"
    if not old and "host" not in headers:
        raise HttpError(400, "the Host header is missing")
    path, _, query = fields.url.decode("latin-1").partition("?")
    return Head(
        method=parser.get_method().decode("ascii"),
        path=path,
        query=query,
        headers=headers,
        length=_length(headers, old),
        keep_alive=_keeps_alive(headers, old),
        expects=not old and headers.get("expect", "").lower() == "100-continue",
        old=old,
    )


def check_beginning(data: bytes) -> None:
    """Refuse a head that can no longer become a good one, before its end has come. Raises HttpError."""
    _parse(_Fields(), data)


def _parse(fields: _Fields, data: bytes) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer, which we do not take
    except httptools.HttpParserError as error:
        raise HttpError(400, f"not HTTP: {error}") from None
    return parser


def _headers(fields: list[tuple[bytes, bytes]]) -> Headers:
    if len(fields) > MAX_HEADERS:
        raise HttpError(431, f"more than {MAX_HEADERS} headers", "headers_too_large")
    headers = Headers()
    for raw, value in fields:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")
        if name not in headers:
            headers[name] = text
        elif name == "host":
            raise HttpError(400, "two Host headers")
        else:
            headers[name] += ", " + text
    return headers


def _keeps_alive(headers: Headers, old: bool) -> bool:
    named = headers.get("connection")
    if named is None:
        return not old
    options = {option.strip() for option in named.lower().split(",")}
    return "keep-alive" in options if old else "close" not in options


def _length(headers: Headers, old: bool) -> int | None:
    coding = headers.get("transfer-encoding")
    if coding is None:
        length: str = headers.get("content-length", "0")
        if len(length) > _LONGEST_LENGTH:
            raise HttpError(413, "the body is too large", "body_too_large")
        return int(length)  # llhttp lets nothing but digits through
    if old:
        raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
    if coding.lower() != "chunked":
        raise HttpError(501, f"Transfer-Encoding {coding!r}: only chunked is understood here", "transfer_encoding")
    return None


class Chunks:
    """A chunked body being read. `body` grows to at most `limit` bytes; `rest` is what follows it once it is done."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = b""
        self._at = 0  # how much of it has been read: cutting that off for each chunk would cost the square of it
        self._left = 0  # of the chunk being read; its CRLF is not counted
        self._step = self._size
        self._trailers = 0
        self.body = bytearray()
        self.done = False

    @property
    def rest(self) -> bytes:
        return self._buffer[self._at :] if self.done else b""

    def feed(self, data: bytes) -> None:
        """Raises HttpError."""
        self._buffer, self._at = self._buffer[self._at :] + data, 0
        while not self.done and self._step():
            pass

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._at)
        if end < 0:
            if len(self._buffer) - self._at > _LONGEST_LINE:
                raise HttpError(400, "a line of the chunked body is too long")
            return None
        line, self._at = self._buffer[self._at : end + 1], end + 1
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "a line of the chunked body ends without CR")
        return line[:-2]

    def _size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        match = _CHUNK.match(line) if len(line) <= _LONGEST_LINE else None
        if match is None:
            raise HttpError(400, "bad chunk size")
        self._left = int(match[1], 16)
        if self._left + len(self.body) > self._limit:
            raise HttpError(413, f"the body is larger than {self._limit} bytes", "body_too_large")
        self._step = self._data if self._left else self._trailer
        return True

    def _data(self) -> bool:
        taken = self._buffer[self._at : self._at + self._left]
        self.body += taken
        self._left -= len(taken)
        self._at += len(taken)
        if not self._left:
            self._step = self._data_end
        return self._at < len(self._buffer)

    def _data_end(self) -> bool:
        end = self._buffer[self._at : self._at + 2]
        if not b"\r\n".startswith(end):
            raise HttpError(400, "a chunk is longer than its size")
        if len(end) < 2:
            return False
        self._at += 2
        self._step = self._size
        return True

    def _trailer(self) -> bool:
        """Trailers are read and dropped: no field of theirs may matter after the body."""
        line = self._line()
        if line is None:
            return False
        self._trailers += len(line)
        if line and (self._trailers > _LONGEST_TRAILERS or not _TRAILER.match(line)):
            raise HttpError(400, "bad trailer")
        self.done = not line
        return True
