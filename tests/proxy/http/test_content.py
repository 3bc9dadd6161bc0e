"""Unpacking: what comes out, and that little cannot become much."""

import gzip
from collections.abc import Callable
from random import Random

import pytest
import zstandard

from proxy.http.content import unpack
from proxy.http.message import HttpError

TEXT = b'{"a": 1}' * 1000


def zipped(data: bytes) -> bytes:
    """The same bytes whenever it is asked, as names of tests have to be."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("packed", "coding"),
    [
        (TEXT, "identity"),
        (zipped(TEXT), "gzip"),
        (zipped(TEXT), " X-GZIP "),
        (zipped(TEXT[:100]) + zipped(TEXT[100:]), "gzip"),
        (zstandard.compress(TEXT), "zstd"),
        (zstandard.compress(TEXT[:100]) + zstandard.compress(TEXT[100:]), "zstd"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(TEXT), "zstd"),
    ],
)
def test_it_is_what_was_packed(packed: bytes, coding: str) -> None:
    assert unpack(packed, coding, len(TEXT)) == TEXT
    assert unpack(bytearray(packed), coding, len(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("packed", "coding", "status"),
    [
        (zipped(bytes(1 << 26)), "gzip", 413),
        (zstandard.compress(bytes(1 << 26)), "zstd", 413),
        (zipped(TEXT)[:-9], "gzip", 400),
        (zstandard.compress(TEXT)[:-9], "zstd", 400),
        (b"junk", "gzip", 400),
        (zipped(TEXT) + b"junk", "gzip", 400),
        (b"junk", "zstd", 400),
        (TEXT, "br", 415),
        (gzip.compress(b"") * 65_537, "gzip", 400),
        (b"\x50\x2a\x4d\x18\0\0\0\0" * 65_537, "zstd", 400),
        (TEXT, "gzip, gzip", 415),
    ],
)
def test_what_is_refused(packed: bytes, coding: str, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        unpack(packed, coding, 1 << 20)
    assert caught.value.status == status


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize(("count", "size"), [(20_000, 0), (2_000, 3), (5, 30_000), (1, 300_000)])
def test_however_many_members_there_are(pack: Callable[[bytes], bytes], count: int, size: int) -> None:
    """Each is as long as it is, and its end may be anywhere in what is fed at once."""
    data = Random(7).randbytes(size)
    coding = "gzip" if pack is gzip.compress else "zstd"
    assert unpack(pack(data) * count, coding, count * size) == data * count
