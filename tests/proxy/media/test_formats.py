"""Sizes from real images of every format, against what Pillow says; and never a crash on bytes that are none."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from proxy.media.formats import Shape, measure
from tests.fakes.media import image
from tests.support import containers

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def size_of(data: bytes, head: int | None = None) -> tuple[int | None, int | None]:
    """`head`: so many bytes of it are at hand, the others can be had."""
    if head is None:
        found = measure("image", data, len(data))
    else:
        found = measure("image", data[:head], len(data), lambda start, count: data[start : start + count])
    return found.width, found.height


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)  # Pillow takes its time
@given(size=st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_size_of_every_format(kind: str, size: tuple[int, int]) -> None:
    data = image(*size, kind)
    assert size_of(data) == size
    assert size_of(data, 12) == size, "wherever its header stands"


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": True, "exact": True}, {"quality": 5}])
def test_size_of_every_webp(options: dict[str, object]) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (301, 47), (1, 2, 3, 4)).save(out, "WEBP", **options)
    assert size_of(out.getvalue()) == (301, 47)


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}])
def test_size_of_every_tiff(options: dict[str, object]) -> None:
    out = io.BytesIO()
    Image.new("RGB", (301, 47)).save(out, "TIFF", **options)
    assert size_of(out.getvalue()) == (301, 47)


def test_size_of_a_big_endian_tiff() -> None:
    entries = [(254, 4, 1, 0), (256, 4, 1, 301), (257, 3, 1, 47 << 16)]
    directory = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *entry) for entry in entries)
    assert size_of(b"MM\0*" + struct.pack(">I", 8) + directory) == (301, 47)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_of_a_heif_the_whole_image_counts(brand: bytes) -> None:
    """A phone's photo is a grid of tiles of 512 x 512, with a thumbnail."""
    assert size_of(containers.heif((512, 512), (4032, 3024), (320, 240), brand=brand)) == (4032, 3024)


def test_a_sequence_of_images_has_its_size_in_a_track() -> None:
    assert size_of(containers.mp4((480, 270)).replace(b"ftypisom", b"ftypavis")) == (480, 270)


def test_a_jpegs_size_behind_large_profiles() -> None:
    """A camera's JPEG may have a preview in its EXIF block and a profile of several segments of 64 KiB after it."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "x" * 60000
    Image.new("RGB", (123, 45)).save(out, "JPEG", progressive=True, exif=exif, icc_profile=bytes(300_000))
    data = out.getvalue()
    assert data.index(b"\xff\xc2") > 300_000
    assert size_of(data) == size_of(data, 64 << 10) == (123, 45)
    assert measure("image", data[: 64 << 10], len(data)) == Shape("image", len(data)), "not there yet"


def test_old_and_top_down_bitmaps() -> None:
    core = b"BM" + bytes(12) + struct.pack("<IHH", 12, 7, 9) + bytes(8)
    assert size_of(core) == (7, 9)
    down = b"BM" + bytes(12) + struct.pack("<Iii", 40, 7, -9) + bytes(20)
    assert size_of(down) == (7, 9)


def test_what_has_no_pixels_or_is_no_image_has_no_size() -> None:
    assert size_of(image(5, 6)[:16] + bytes(8)) == (None, None)
    assert size_of(b"%PDF-1.7" + bytes(100)) == (None, None)


SAMPLES = [
    *(image(50, 60, kind) for kind in KINDS),
    *(containers.heif((5, 6)), containers.mp4(), containers.mp4(index_last=100, version=1), containers.webm()),
    *(containers.wav(0.1), containers.flac(1), containers.opus(1), containers.vorbis(1), containers.mp3(3, picture=9)),
]


@given(
    st.sampled_from(SAMPLES),
    st.sampled_from(["image", "video", "audio"]),
    st.integers(0, 500),
    st.binary(max_size=64),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4),
    st.integers(0, 1 << 33),
    st.booleans(),
)
def test_whatever_the_bytes_are_a_shape_comes(
    sample: bytes,
    modality: str,
    keep: int,
    tail: bytes,
    changes: list[tuple[int, int]],
    claimed: int,
    reachable: bool,
) -> None:
    data = bytearray(sample[:keep] + tail)
    for at, value in changes:
        if at < len(data):
            data[at] = value
    looks = 0

    def more(start: int, count: int) -> bytes:
        nonlocal looks
        looks += 1
        return bytes(data[start : start + count])

    found = measure(modality, bytes(data), max(claimed, len(data)), more if reachable else None)
    assert (found.width is None) == (found.height is None)
    for number in (found.width, found.height, found.frames, found.seconds):
        assert number is None or number > 0
    assert looks < 20_000


@pytest.mark.parametrize(
    "hostile",
    [
        b"\xff\xd8" + b"\xff" * 1_000_000,
        b"\xff\xd8" + b"\xff\xd0" * 500_000,
        b"\xff\xd8" + b"\xff\xe0\0\0" * 250_000,
        b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12) * 65535,
        b"\0\0\0\x08ftyp" * 100_000,
        b"\x1a\x45\xdf\xa3\x80" + b"\xec\x80" * 500_000,
        b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 100_000,
    ],
    ids=["fill bytes", "restarts", "empty segments", "tags", "boxes", "elements", "chunks"],
)
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_endless_chains_are_left(hostile: bytes, modality: str) -> None:
    looks = 0

    def more(start: int, count: int) -> bytes:
        nonlocal looks
        looks += 1
        return hostile[start : start + count]

    assert measure(modality, hostile[:12], len(hostile), more).width is None
    assert looks < 3000
