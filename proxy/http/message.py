"""Requests' heads and whole answers as values, and how a head is written. Nothing is read from or sent to a socket."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeAlias

import orjson

Data: TypeAlias = bytes | bytearray
Buffer: TypeAlias = Data | memoryview

JSON = "application/json"
_BREAKS = re.compile("[\r\n\0]+")
_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class HttpError(Exception):
    """What a client sent cannot be taken as HTTP, or not in this size. The connection ends after the answer."""

    def __init__(self, status: int, message: str, code: str = "bad_http") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Headers(dict[str, str]):
    """By lower-case name, and only so; the values of a repeated field are joined with commas (RFC 9110 5.3)."""


@dataclass(slots=True)
class Head:
    """A request's first line and fields. `length` is None for a chunked body."""

    method: str
    path: str
    query: str
    headers: Headers
    length: int | None
    keep_alive: bool
    expects: bool = False  # it waits for 100 Continue
    old: bool = False  # HTTP/1.0, which knows no chunks


@dataclass(slots=True)
class Response:
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: object, status: int = 200) -> Response:
    return Response(status, orjson.dumps(value), {"content-type": JSON})


def head_bytes(first: str, headers: Mapping[str, str], framing: str) -> bytes:
    """A head from its first line and fields; `framing` is whole lines of ours."""
    lines = [first, framing, *[f"{name}: {value}\r\n" for name, value in headers.items()], "\r\n"]
    data = "".join(lines).encode("latin-1", "replace")
    lines_due = len(headers) + framing.count("\n") + 2
    if data.count(b"\n") != lines_due or data.count(b"\r") != lines_due or b"\0" in data:
        clean = {name: _BREAKS.sub(" ", value) for name, value in headers.items()}
        return head_bytes(first, clean, framing)  # a line break in a value ends here, not on the wire
    return data


def status_line(status: int) -> str:
    return _LINES.get(status) or f"HTTP/1.1 {status} \r\n"


def size(body: Buffer | list[Buffer]) -> int:
    """Of a body in one piece or several, in bytes."""
    return sum(map(len, body)) if isinstance(body, list) else len(body)
