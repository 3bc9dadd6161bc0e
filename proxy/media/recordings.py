"""How large and how long films and sounds are, out of their headers. Nothing is decoded here.

Sources of the layouts: MP4 and MOV (ISO 14496-12), Matroska (RFC 9559), AVI (AVIMAINHEADER), WAV (RIFF), MP3 (ISO
11172-3; Xing's and ID3v2's headers), FLAC (RFC 9639), Ogg (RFC 3533) with Vorbis or Opus (RFC 7845).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.media.view import STEPS, View

_BITRATES = {  # kbit/s by MPEG version 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by MPEG version's bits
_PAGE = 65307  # bytes of the largest Ogg page

_INTO = frozenset({0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0})  # Segment, Info, Tracks, TrackEntry, Video
_CLUSTER, _SCALE, _DURATION, _WIDTH, _HEIGHT = 0x1F43B675, 0x2AD7B1, 0x4489, 0xB0, 0xBA


@dataclass(slots=True)
class Found:
    """A shape on its way; 0: not found."""

    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0


# ---- films


def film(view: View, found: Found) -> None:
    """Fill in what is told, as far as the bytes are there. Raises Short."""
    magic = view.some(0, 12)
    if magic[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        mp4(view, found)
    elif magic.startswith(b"\x1a\x45\xdf\xa3"):
        _matroska(view, found)
    elif magic.startswith(b"RIFF") and magic[8:] == b"AVI ":
        _avi(view, found)


def _avi(view: View, found: Found) -> None:
    """Its main header comes first."""
    if view.at(24, 4) == b"avih":
        found.width, found.height, found.frames = view.little(64, 4), view.little(68, 4), view.little(48, 4)
        found.seconds = found.frames * view.little(32, 4) / 1e6


def boxes(view: View, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each box there. Raises Short."""
    for _ in range(STEPS):
        if start + 8 > end:
            return
        size, kind = struct.unpack(">I4s", view.at(start, 8))
        head = 8
        if size == 1:
            size, head = view.big(start + 8, 8), 16
        stop = end if size == 0 else min(start + size, end)
        if stop < start + head:
            return
        yield kind, start + head, stop
        start = stop


def within(view: View, *path: bytes, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
    """(start, end) of what a box by that path holds; None if there is none. Raises Short."""
    stop = view.nbytes if end is None else end
    for wanted in path:
        found = next(((at, to) for kind, at, to in boxes(view, start, stop) if kind == wanted), None)
        if found is None:
            return None
        start, stop = found
        start += 4 if wanted == b"meta" else 0  # a full box: version and flags
    return start, stop


def mp4(view: View, found: Found) -> None:
    """A file that was not made for streaming has its index behind the frames. Raises Short."""
    movie = within(view, b"moov")
    for kind, at, end in boxes(view, *movie) if movie else ():
        if kind == b"mvhd":
            found.seconds = _ticks(view, at)
        elif kind == b"trak" and not found.width:
            found.width, found.height = _canvas(view, at, end)
            if found.width and (sizes := within(view, b"mdia", b"minf", b"stbl", b"stsz", start=at, end=end)):
                found.frames = view.big(sizes[0] + 8, 4)


def _ticks(view: View, at: int) -> float:
    """Seconds, out of a `mvhd` box; 0 in a file of fragments, which tell their own."""
    long = view.at(at, 1) == b"\1"
    scale, duration = struct.unpack(">IQ" if long else ">II", view.at(at + (20 if long else 12), 12 if long else 8))
    unknown = duration >= (1 << (64 if long else 32)) - 1
    return float(duration / scale) if scale and not unknown else 0.0


def _canvas(view: View, start: int, end: int) -> tuple[int, int]:
    """Of a track, in pixels; (0, 0) of a sound's."""
    header = within(view, b"tkhd", start=start, end=end)
    if header is None:
        return 0, 0
    at = header[0] + (88 if view.at(header[0], 1) == b"\1" else 76)
    return view.big(at, 4) >> 16, view.big(at + 4, 4) >> 16


def _matroska(view: View, found: Found) -> None:
    scale, ticks = 1_000_000, 0.0  # nanoseconds of a tick
    for name, at, end in _elements(view):
        if name == _CLUSTER:
            break
        if name == _SCALE:
            scale = view.big(at, min(end - at, 8))
        elif name == _DURATION and end - at in (4, 8):
            ticks = struct.unpack(">f" if end - at == 4 else ">d", view.at(at, end - at))[0]
        elif name == _WIDTH:
            found.width = view.big(at, min(end - at, 8))
        elif name == _HEIGHT:
            found.height = view.big(at, min(end - at, 8))
        found.seconds = ticks * scale / 1e9


def _elements(view: View) -> Iterator[tuple[int, int, int]]:
    """(id, start, end) of the content of each EBML element, and instead of those in `_INTO` what they hold."""
    at = 0
    for _ in range(STEPS):
        if at >= view.nbytes:
            return
        name, at = _number(view, at)
        size, at = _number(view, at, value=True)
        if name not in _INTO:
            yield name, at, at + size
            at += size


def _number(view: View, at: int, value: bool = False) -> tuple[int, int]:
    """An EBML number and where it ends: its first bit that is set tells its length, and is no part of its `value`."""
    length = 9 - view.at(at, 1)[0].bit_length()
    number = view.big(at, length)
    return number & ((1 << 7 * length) - 1) if value else number, at + length


# ---- sound: seconds, 0 where no reader knows the bytes


def sound(view: View) -> float:
    """Raises Short."""
    magic = view.some(0, 12)
    if magic.startswith((b"RIFF", b"RF64")) and magic[8:] == b"WAVE":
        return _wav(view)
    if magic.startswith(b"fLaC"):
        return _flac(view, 4)
    if magic.startswith(b"OggS"):
        return _ogg(view)
    if magic.startswith(b"ID3") or (len(magic) > 1 and magic[0] == 0xFF and magic[1] >= 0xE0):
        return _mp3(view)
    found = Found()
    film(view, found)
    return found.seconds


def _wav(view: View) -> float:
    at, rate = 12, 0  # bytes per second
    for _ in range(STEPS):
        kind, size = struct.unpack("<4sI", view.at(at, 8))
        if kind == b"fmt ":
            rate = view.little(at + 16, 4)
        if kind == b"data":
            return min(size, view.nbytes - at - 8) / rate if rate else 0.0  # a stream's size is left at its largest
        at += 8 + size + size % 2
    return 0.0


def _flac(view: View, at: int) -> float:
    bits = view.big(at + 14, 8)  # of STREAMINFO, which comes first: 20 rate, 3 channels, 5 depth, 36 samples
    rate, samples = bits >> 44, bits & ((1 << 36) - 1)
    return samples / rate if rate else 0.0


def _ogg(view: View) -> float:
    """The last page counts all samples."""
    first = view.some(0, 256)
    rate, before = 0, 0
    if (at := first.find(b"\x01vorbis")) >= 0:
        rate = view.little(at + 12, 4)
    elif (at := first.find(b"OpusHead")) >= 0:
        rate, before = 48000, view.little(at + 10, 2)
    elif (at := first.find(b"\x7fFLAC")) >= 0:
        return _flac(view, at + 13)
    tail = view.some(max(0, view.nbytes - _PAGE), _PAGE)
    page = tail.rfind(b"OggS")
    if not rate or page < 0 or len(tail) < page + 14:
        return 0.0
    return (int.from_bytes(tail[page + 6 : page + 14], "little", signed=True) - before) / rate


def _mp3(view: View) -> float:
    """By the count of frames that encoders of a varying rate write into the first; else of a constant rate."""
    at = 0
    if view.some(0, 3) == b"ID3":
        a, b, c, d = view.at(6, 4)  # 7 bits each
        at = 10 + (a << 21 | b << 14 | c << 7 | d)
    bits = view.big(at, 4)
    version, layer = bits >> 19 & 3, 4 - (bits >> 17 & 3)
    step, pace = bits >> 12 & 15, bits >> 10 & 3
    if bits >> 21 != 0x7FF or version == 1 or layer == 4 or step in (0, 15) or pace == 3:
        return 0.0
    rate = _RATES[version][pace]
    start = view.some(at, 64)
    tag = max(start.find(b"Xing"), start.find(b"Info"))
    if tag > 0 and len(start) >= tag + 12 and start[tag + 7] & 1:
        samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
        return int.from_bytes(start[tag + 8 : tag + 12], "big") * samples / rate
    return (view.nbytes - at) * 8 / (_BITRATES[version == 3, layer][step - 1] * 1000)
