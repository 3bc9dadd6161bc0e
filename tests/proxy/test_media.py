"""Sizes from real images of every format, against what Pillow says; and never a crash on bytes that are none."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from proxy import media
from tests.fakes.media import image


@pytest.mark.parametrize("size", [(1, 1), (640, 37), (33, 1200)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_size_of_every_format(kind: str, size: tuple[int, int]) -> None:
    assert media.image_size(image(*size, kind)) == size


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": True, "exact": True}, {"quality": 5}])
def test_size_of_every_webp(options: dict[str, object]) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (301, 47), (1, 2, 3, 4)).save(out, "WEBP", **options)
    assert media.image_size(out.getvalue()) == (301, 47)


def test_a_jpegs_size_behind_a_large_profile_and_progressive_scans() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "x" * 30000
    Image.new("RGB", (123, 45)).save(out, "JPEG", progressive=True, exif=exif)
    assert media.image_size(out.getvalue()) == (123, 45)
    assert media.image_size(out.getvalue()[:1000]) is None, "not there yet"


def test_old_and_top_down_bitmaps() -> None:
    core = b"BM" + bytes(12) + struct.pack("<IHH", 12, 7, 9) + bytes(8)
    assert media.image_size(core) == (7, 9)
    down = b"BM" + bytes(12) + struct.pack("<Iii", 40, 7, -9) + bytes(20)
    assert media.image_size(down) == (7, 9)


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.integers(0, 200), st.binary(max_size=64))
def test_cut_and_foreign_bytes_give_a_size_or_none(kind: str, keep: int, tail: bytes) -> None:
    found = media.image_size(image(5, 6, kind)[:keep] + tail)
    assert found is None or len(found) == 2


def test_tokens_follow_the_size() -> None:
    assert media.tokens("image", image(280, 56), 99) == 10 * 2
    assert media.tokens("image", image(1, 1), 99) == media.MIN_TOKENS
    assert media.image_tokens(100_000, 100_000) == media.MAX_TOKENS
    assert media.tokens("image", b"????", 4) == media.UNKNOWN_TOKENS
    assert media.tokens("video", b"", 512 * 100) == 100
    assert media.tokens("audio", b"", 640 * 9) == 9
