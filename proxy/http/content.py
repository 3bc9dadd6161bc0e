"""Content-Encoding of request bodies: gzip and zstd, unpacked to a limit, so that no small body fills memory."""

from __future__ import annotations

import zlib

import zstandard

from proxy.http.message import Buffer, Data, HttpError

_PIECE = 1 << 20
_GZIP_STEP = 8 << 10  # bytes fed at once; what follows a member's end is copied, and a body may be thousands of members
_ZSTD_STEP = 1 << 10  # the same; a frame's output cannot be limited, and a step of 1 KiB unpacks to 32 MiB at most
_GZIP = 16 + zlib.MAX_WBITS
_MOST_MEMBERS = 1 << 16  # or frames: a client may send a million empty ones, each of which costs as much as 64 KiB
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
    raise HttpError(415, "Content-Encoding: only gzip and zstd are understood here", "content_encoding")


def _gunzip(data: Data, limit: int) -> bytearray:
    out, view, at, members = bytearray(), memoryview(data), 0, 0
    try:
        while at < len(view):  # one member after the other; of each step, what is behind its end is fed again
            members = _another(members)
            member = zlib.decompressobj(_GZIP)
            while not member.eof:
                step: Buffer = member.unconsumed_tail
                if not step:
                    step = view[at : at + _GZIP_STEP]
                    at += len(step)
                piece = member.decompress(step, _PIECE)
                if not piece and not step and not member.eof:
                    raise HttpError(400, "the gzip body breaks off")
                out += piece
                _check(out, limit)
            at -= len(member.unused_data)
    except zlib.error as error:
        raise HttpError(400, f"the body is not gzip: {error}") from None
    return out


def _unzstd(data: Data, limit: int) -> bytearray:
    out, view, at, frames = bytearray(), memoryview(data), 0, 0
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        while at < len(view):  # one frame after the other, likewise
            frames = _another(frames)
            frame = decompressor.decompressobj(write_size=_PIECE)
            while not frame.eof:
                step = view[at : at + _ZSTD_STEP]
                if not step:
                    raise HttpError(400, "the zstd body breaks off")
                at += len(step)
                out += frame.decompress(step)
                _check(out, limit)
            at -= len(frame.unused_data)
    except zstandard.ZstdError as error:
        raise HttpError(400, f"the body is not zstd: {error}") from None
    return out


def _another(members: int) -> int:
    if members == _MOST_MEMBERS:
        raise HttpError(400, f"the packed body has more than {_MOST_MEMBERS} members")
    return members + 1


def _check(out: bytearray, limit: int) -> None:
    if len(out) > limit:
        raise HttpError(413, f"the body unpacks to more than {limit} bytes", "body_too_large")
