"""Content-Encoding of request bodies: gzip and zstd, unpacked to a limit, so that no small body fills memory."""

from __future__ import annotations

import io
import zlib

import zstandard

from proxy.http.message import Data, HttpError

_PIECE = 1 << 20
_GZIP = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW = 8 << 20  # what RFC 8878 asks every decoder to support; a larger one is memory that a client commands


def unpack(data: Data, coding: str, limit: int) -> Data:
    """`data` without its coding. Raises HttpError: 415 for a coding unknown here, 413 over `limit`, 400 if broken."""
    name = coding.strip().lower()
    if name in ("", "identity"):
        return data
    if name in ("gzip", "x-gzip"):
        return _gunzip(data, limit)
    if name == "zstd":
        return _unzstd(data, limit)
    raise HttpError(415, f"Content-Encoding {coding!r}: only gzip and zstd are understood here", "content_encoding")


def _gunzip(data: Data, limit: int) -> bytearray:
    out, rest = bytearray(), bytes(data)
    try:
        while rest:  # one member after the other
            member = zlib.decompressobj(_GZIP)
            while not member.eof:
                piece = member.decompress(rest, _PIECE)
                rest = member.unused_data if member.eof else member.unconsumed_tail
                if not piece and not rest and not member.eof:
                    raise HttpError(400, "the gzip body breaks off")
                out += piece
                _check(out, limit)
    except zlib.error as error:
        raise HttpError(400, f"the body is not gzip: {error}") from None
    return out


def _unzstd(data: Data, limit: int) -> bytearray:
    out = bytearray()
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    rest = bytes(data)
    try:
        while rest:  # one frame after the other
            frame = decompressor.decompressobj(write_size=_PIECE)
            source = io.BytesIO(rest)
            # Fed in small steps, since a frame's output cannot be limited: a step of 1 KiB unpacks to 32 MiB at most.
            while not frame.eof:
                step = source.read(1024)
                if not step:
                    raise HttpError(400, "the zstd body breaks off")
                out += frame.decompress(step)
                _check(out, limit)
            rest = frame.unused_data + source.read()
    except zstandard.ZstdError as error:
        raise HttpError(400, f"the body is not zstd: {error}") from None
    return out


def _check(out: bytearray, limit: int) -> None:
    if len(out) > limit:
        raise HttpError(413, f"the body unpacks to more than {limit} bytes", "body_too_large")
