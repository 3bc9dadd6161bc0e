"""What media are, from their first bytes and a few of those that these point to: size in pixels, length in seconds.

Nothing is decoded here. Whatever the bytes are, an answer comes after a bounded number of looks, and nothing is raised.

Sources of the layouts: PNG (ISO 15948, IHDR), JPEG (ITU T.81, SOFn), WebP (RFC 9649), GIF89a, BMP (BITMAPINFOHEADER),
TIFF 6.0 and BigTIFF, HEIF and AVIF (ISO 23008-12, ispe).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from proxy.media.recordings import Found, boxes, film, mp4, sound, within
from proxy.media.view import STEPS, More, Short, View

_AGE = 1e9  # seconds: no recording is as long

# Start of frame markers: all of 0xC0..0xCF but DHT (C4), JPG (C8) and DAC (CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})

_TIFF_NUMBERS = {3: "H", 4: "I"}  # by type: SHORT, LONG


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of media; None: not known. All numbers are above 0."""

    modality: str  # image | video | audio
    nbytes: int | None = None  # None: they are elsewhere
    width: int | None = None  # pixels, before EXIF rotation
    height: int | None = None
    frames: int | None = None  # all that a video has
    seconds: float | None = None


def measure(modality: str, head: bytes, nbytes: int, more: More | None = None) -> Shape:
    """The shape of media of `nbytes` that begin with `head`; `more` reaches the rest, where it is here."""
    view = View(head, nbytes, more)
    if modality == "image":
        try:
            size = _image(view)
        except Short:
            size = None
        return Shape(modality, nbytes, *size) if size and all(size) else Shape(modality, nbytes)
    found = Found()
    try:
        if modality == "video":
            film(view, found)
        else:
            found.seconds = sound(view)
    except Short:
        pass  # what was found before stays
    sized = found.width and found.height
    width, height = (found.width, found.height) if sized else (None, None)
    seconds = found.seconds if 0 < found.seconds < _AGE else None
    return Shape(modality, nbytes, width, height, found.frames or None, seconds)


# ---- images: (width, height), None where no reader knows the bytes


def _image(view: View) -> tuple[int, int] | None:
    magic = view.some(0, 12)
    if magic.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack(">II", view.at(16, 8))
        return width, height
    if magic.startswith(b"\xff\xd8"):
        return _jpeg(view)
    if magic.startswith(b"RIFF") and magic[8:] == b"WEBP":
        return _webp(view)
    if magic.startswith((b"GIF87a", b"GIF89a")):
        return view.little(6, 2), view.little(8, 2)
    if magic.startswith(b"BM"):
        return _bmp(view)
    if magic.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _tiff(view)
    return _heif(view) if magic[4:8] == b"ftyp" else None


def _jpeg(view: View) -> tuple[int, int] | None:
    """Profiles of any length may stand before the frame, in segments of 64 KiB at the most."""
    at = 2
    for _ in range(STEPS):
        lead, marker, length, _, height, width = struct.unpack(">BBHBHH", view.at(at, 9))
        if lead != 0xFF:
            return None
        if marker in _SOF:
            return width, height
        at += 1 if marker == 0xFF else 2 if marker in _STANDALONE else 2 + length  # 0xFF: a fill byte
    return None


def _webp(view: View) -> tuple[int, int] | None:
    kind = view.at(12, 4)
    if kind == b"VP8X":
        return 1 + view.little(24, 3), 1 + view.little(27, 3)
    if kind == b"VP8L":
        bits = view.little(21, 4)
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if kind == b"VP8 ":
        return view.little(26, 2) & 0x3FFF, view.little(28, 2) & 0x3FFF
    return None


def _bmp(view: View) -> tuple[int, int]:
    if view.little(14, 4) == 12:  # BITMAPCOREHEADER
        return view.little(18, 2), view.little(20, 2)
    width, height = struct.unpack("<ii", view.at(18, 8))
    return abs(width), abs(height)  # negative: rows run top-down


def _tiff(view: View) -> tuple[int, int] | None:
    """Of the first directory, which may stand behind the pixels. Its tags are sorted: 256 is the width, 257 the
    height."""
    magic = view.at(0, 4)
    order = "<" if magic[:1] == b"I" else ">"
    big = b"+" in magic
    count_at = struct.unpack(order + ("Q" if big else "I"), view.at(8 if big else 4, 8 if big else 4))[0]
    entries = count_at + (8 if big else 2)
    count = struct.unpack(order + ("Q" if big else "H"), view.at(count_at, entries - count_at))[0]
    size, value = (20, 12) if big else (12, 8)
    found: dict[int, int] = {}
    for n in range(min(count, STEPS)):
        entry = view.at(entries + n * size, size)
        tag, kind = struct.unpack_from(order + "HH", entry)
        if tag in (256, 257) and kind in _TIFF_NUMBERS:
            found[tag] = struct.unpack_from(order + _TIFF_NUMBERS[kind], entry, value)[0]
        if tag >= 257:
            break
    return (found[256], found[257]) if len(found) == 2 else None


def _heif(view: View) -> tuple[int, int] | None:
    """Of the largest image in the file: the others are its tiles, thumbnails and masks. A sequence has none, but a
    track."""
    properties = within(view, b"meta", b"iprp", b"ipco")
    if properties is None:
        film = Found()
        mp4(view, film)
        return film.width, film.height
    sizes = [(view.big(at + 4, 4), view.big(at + 8, 4)) for kind, at, _ in boxes(view, *properties) if kind == b"ispe"]
    return max(sizes, key=lambda size: size[0] * size[1], default=None)
