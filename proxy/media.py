"""Size and cost of a media item from its first bytes. Nothing is decoded here: a header of a few dozen bytes is read.

Sources of the layouts: PNG (ISO 15948, IHDR), JPEG (ITU T.81, SOFn), WebP (RFC 9649), GIF89a, BMP (BITMAPINFOHEADER).
"""

from __future__ import annotations

from math import ceil

# One vision token covers 28 x 28 pixels in Qwen2-VL and Qwen2.5-VL (patch 14, merged 2 x 2) and 32 x 32 in Qwen3-VL.
# A prediction for balancing needs only one of them.
PIXELS_PER_TOKEN_SIDE = 28
MIN_TOKENS, MAX_TOKENS = 4, 16384
UNKNOWN_TOKENS = 1024  # media behind a URL, or an image in a format that is not read here: about 900 x 900
BYTES_PER_VIDEO_TOKEN = 512
BYTES_PER_AUDIO_TOKEN = 640

# Start of frame markers: all of 0xC0..0xCF but DHT (C4), JPG (C8) and DAC (CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


def image_size(head: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) in pixels, before EXIF rotation; None if the format is unknown or `head` is too short."""
    data = memoryview(head)
    magic = bytes(data[:12])
    if magic.startswith(b"\x89PNG\r\n\x1a\n"):
        return _pair(data, 16, 20, 4, "big")
    if magic.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    if magic.startswith((b"GIF87a", b"GIF89a")):
        return _pair(data, 6, 8, 2, "little")
    if magic.startswith(b"RIFF") and magic[8:12] == b"WEBP":
        return _webp_size(data)
    if magic.startswith(b"BM"):
        return _bmp_size(data)
    return None


def tokens(modality: str, head: bytes | memoryview, nbytes: int) -> int:
    """Predicted tokens of an item of `nbytes` that begins with `head`."""
    if modality == "image":
        size = image_size(head)
        return UNKNOWN_TOKENS if size is None else image_tokens(*size)
    per_token = BYTES_PER_VIDEO_TOKEN if modality == "video" else BYTES_PER_AUDIO_TOKEN
    return max(MIN_TOKENS, min(MAX_TOKENS, nbytes // per_token))


def image_tokens(width: int, height: int) -> int:
    """Vision tokens of an image of this size, within what processors resize to by default."""
    side = PIXELS_PER_TOKEN_SIDE
    return max(MIN_TOKENS, min(MAX_TOKENS, ceil(width / side) * ceil(height / side)))


def _pair(data: memoryview, first: int, second: int, width: int, order: str) -> tuple[int, int] | None:
    if len(data) < second + width:
        return None
    one, two = data[first : first + width], data[second : second + width]
    if order == "big":
        return int.from_bytes(one, "big"), int.from_bytes(two, "big")
    return int.from_bytes(one, "little"), int.from_bytes(two, "little")


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _SOF:
            height_width = _pair(data, at + 5, at + 7, 2, "big")
            return None if height_width is None else (height_width[1], height_width[0])
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp_size(data: memoryview) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if kind == b"VP8 ":
        pair = _pair(data, 26, 28, 2, "little")
        return None if pair is None else (pair[0] & 0x3FFF, pair[1] & 0x3FFF)
    return None


def _bmp_size(data: memoryview) -> tuple[int, int] | None:
    if len(data) < 26:
        return None
    if int.from_bytes(data[14:18], "little") == 12:  # BITMAPCOREHEADER
        return _pair(data, 18, 20, 2, "little")
    width = int.from_bytes(data[18:22], "little", signed=True)
    height = int.from_bytes(data[22:26], "little", signed=True)  # negative: rows run top-down
    return abs(width), abs(height)
