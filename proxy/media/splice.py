"""Bodies without the weight of their media: big base64 strings are cut out before JSON is read, and spliced in again
where JSON is written. They are never copied, and never part of what orjson sees. No I/O.

    raw       {"messages":[{"content":[{"image_url":{"url":"data:image/png;base64,iVBORw0K……"}}]}]}
    skeleton  {"messages":[{"content":[{"image_url":{"url":"data:image/png;base64,~0f3a…~0~"}}]}]}
                                                             └ a mark that nobody can have sent ┘

Base64 holds neither quote nor escape, so a cut ends at the next quote. Whatever is unusual (text that is no strict
base64, a cut that is not an item's media) is left to a plain parse of everything.
"""

from __future__ import annotations

import binascii
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson
from blake3 import blake3

try:  # 40 times as fast; binascii is for where it has no wheel
    from pybase64 import b64decode as _fast
except ImportError:
    _fast = None

Buffer: TypeAlias = bytes | bytearray | memoryview
Pieces: TypeAlias = list[Buffer]

LARGE = 64 << 10  # bytes; a smaller body is parsed as fast as it is searched
_SHORTEST = 4 << 10  # of a string worth a cut
_MOST = 512  # cuts
_PIECE = 96 << 10  # bytes of base64 decoded at once
_URL, _DATA = b";base64,", b'"data"'
_SPACE = b" \t\r\n"
_NONCE = secrets.token_hex(16)
_MARK = f"~{_NONCE}~"


@dataclass(frozen=True, slots=True)
class Cut:
    """A string whose end stays in the bytes that it came in."""

    prefix: str
    text: memoryview

    def __repr__(self) -> str:
        return f"<Cut {self.prefix!r} + {len(self.text)} bytes>"


@dataclass(frozen=True, slots=True)
class Media:
    """What is known of media without keeping them."""

    mm_hash: str  # BLAKE3 of their bytes
    head: bytes  # of the media: all if they are small
    nbytes: int
    text: str | Buffer = field(repr=False, compare=False)  # their base64

    def at(self, start: int, count: int) -> bytes:
        """`count` of their bytes from an offset, fewer where they end; only these are decoded."""
        data = decode(self.text[start // 3 * 4 : (start + count + 2) // 3 * 4]) or b""
        return data[start % 3 : start % 3 + count]


def digest(text: str | Buffer, key: bytes) -> Media | None:
    """The media behind strict base64, or None if it is none. `key`: 32 bytes for BLAKE3, or empty.

    In pieces that stay in the CPU's cache: neither is the text copied nor are the media ever whole.
    """
    hasher = blake3(key=key) if key else blake3()
    head, nbytes = b"", 0
    for start in range(0, len(text), _PIECE):
        data = decode(text[start : start + _PIECE])
        ended = start + _PIECE >= len(text)
        if data is None or (not ended and len(data) != _PIECE // 4 * 3):  # padding in the middle
            return None
        hasher.update(data)
        head = head or data
        nbytes += len(data)
    return Media(hasher.hexdigest(), head, nbytes, text)


def decode(text: str | Buffer) -> bytes | None:
    """The bytes behind strict base64, or None if it is none."""
    try:
        if _fast is not None:
            data: bytes = _fast(text, validate=True)
            return data
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):
        return None


def loads(raw: bytes | bytearray) -> tuple[Any, list[memoryview]]:
    """The value in `raw`, and what was cut out of it; `find` tells what a string lost. Raises orjson.JSONDecodeError.

    Without cuts the value is what orjson makes of `raw`. With cuts the caller must find each exactly once and be strict
    base64, or parse `raw` again by orjson alone: only then was nothing cut but a string's end.
    """
    cuts: list[memoryview] = []
    if len(raw) >= LARGE:
        skeleton = _skeleton(raw, cuts)
        if cuts and skeleton.count(_MARK.encode()) == len(cuts):
            try:
                return orjson.loads(skeleton), cuts
            except orjson.JSONDecodeError:
                pass  # the plain parse names the place in the client's own bytes
    return orjson.loads(raw), []


def _skeleton(raw: bytes | bytearray, cuts: list[memoryview]) -> bytes:
    view = memoryview(raw)
    kept: list[Buffer] = []
    at = 0
    for begin, end in _spans(raw):
        kept += (view[at:begin], f"{_MARK}{len(cuts)}~".encode())
        cuts.append(view[begin:end])
        at = end
    return b"".join([*kept, view[at:]])


def _spans(raw: bytes | bytearray) -> list[tuple[int, int]]:
    """(begin, end) of what may be big base64, in order: from behind a prefix to the next quote.

    First of data URLs; then of the values of "data", between those, so that no megabytes are searched twice.
    """
    found: list[tuple[int, int]] = []
    at = 0
    for url in _urls(raw):
        found += (*_data(raw, at, url[0]), url)
        at = url[1]
    return [*found, *_data(raw, at, len(raw))][:_MOST]


def _urls(raw: bytes | bytearray) -> Iterator[tuple[int, int]]:
    at = 0
    while (start := raw.find(_URL, at)) >= 0:
        at = start + len(_URL)
        end = raw.find(b'"', at)
        if end - at >= _SHORTEST:
            yield at, end
            at = end


def _data(raw: bytes | bytearray, at: int, stop: int) -> Iterator[tuple[int, int]]:
    while (start := raw.find(_DATA, at, stop)) >= 0:
        at = start + len(_DATA)
        begin = _value(raw, at)
        end = raw.find(b'"', begin, stop)
        if end - begin >= _SHORTEST:
            yield begin, end
            at = end


def _value(raw: bytes | bytearray, at: int) -> int:
    """Where the string begins that is the value of a key which ended at `at`; `at` if none does."""
    begin = _skip(raw, at)
    if raw[begin : begin + 1] != b":":
        return at
    begin = _skip(raw, begin + 1)
    return begin + 1 if raw[begin : begin + 1] == b'"' else at


def _skip(raw: bytes | bytearray, at: int) -> int:
    while raw[at : at + 1] and raw[at] in _SPACE:
        at += 1
    return at


def find(text: str, cuts: list[memoryview]) -> tuple[int, str] | None:
    """The number of the cut that `text` ends with, and what stands before it; None if it is a whole string."""
    prefix, mark, number = text.partition(_MARK)
    return (int(number[:-1]), prefix) if mark else None


def dumps(value: Any) -> bytes | Pieces:
    """JSON in which every Cut is the string it was, in one piece, or several if there is a Cut."""
    found: list[Cut] = []

    def default(other: Any) -> str:
        if not isinstance(other, Cut):
            raise TypeError(f"{type(other).__name__} is no JSON")
        found.append(other)
        return _MARK

    data = orjson.dumps(value, default=default, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    if not found:
        return data
    between = data.split(f'"{_MARK}"'.encode())
    pieces: Pieces = [between[0] + _opening(found[0])]
    for number, cut in enumerate(found):
        after = b'"' + between[number + 1]
        pieces += (cut.text, after + _opening(found[number + 1]) if number + 1 < len(found) else after)
    return pieces


def _opening(cut: Cut) -> bytes:
    return orjson.dumps(cut.prefix)[:-1]
