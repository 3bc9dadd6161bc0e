"""Headers of films and sounds as muxers write them, with no frame that could be played."""

from __future__ import annotations

import io
import struct
import wave

AUDIO_TRACK = (0, 0)


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def long_box(kind: bytes, *content: bytes) -> bytes:
    """With a size of 64 bits."""
    data = b"".join(content)
    return struct.pack(">I4sQ", 1, kind, 16 + len(data)) + data


def mp4(
    size: tuple[int, int] = (640, 360),
    seconds: float = 10.0,
    frames: int = 250,
    *,
    version: int = 0,
    index_last: int | None = None,
) -> bytes:
    """A sound track before the film's. `index_last`: so many bytes of frames stand before the index."""
    ticks = round(seconds * 600)
    clock = struct.pack(">B3xQQIQ" if version else ">B3xIIII", version, 0, 0, 600, ticks)
    tracks = [_track(version, AUDIO_TRACK, 999), _track(version, size, frames)]
    movie = box(b"moov", box(b"mvhd", clock, bytes(80)), *tracks)
    start = box(b"ftyp", b"isom\0\0\2\0isomiso2")
    if index_last is None:
        return start + movie + box(b"mdat", bytes(64))
    return start + long_box(b"mdat", bytes(index_last)) + movie


def _track(version: int, size: tuple[int, int], frames: int) -> bytes:
    before = 88 if version else 76
    header = bytes([version]) + bytes(before - 1) + struct.pack(">II", size[0] << 16, size[1] << 16)
    table = box(b"stbl", box(b"stts", bytes(8)), box(b"stsz", struct.pack(">III", 0, 0, frames), bytes(4 * 8)))
    return box(b"trak", box(b"tkhd", header), box(b"mdia", box(b"mdhd", bytes(24)), box(b"minf", table)))


def heif(*sizes: tuple[int, int], brand: bytes = b"heic") -> bytes:
    """Of several images: tiles, a thumbnail, the whole."""
    properties = [box(b"ispe", struct.pack(">III", 0, *size)) for size in sizes]
    meta = box(
        b"meta", bytes(4), box(b"hdlr", bytes(25)), box(b"iprp", box(b"ipco", *properties), box(b"ipma", bytes(9)))
    )
    return box(b"ftyp", brand, bytes(4), brand) + meta + box(b"mdat", bytes(99))


def element(name: int, *content: bytes, unknown: bool = False) -> bytes:
    data = b"".join(content)
    length = b"\x01" + b"\xff" * 7 if unknown else struct.pack(">Q", len(data) | 1 << 56)
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + length + data


def webm(size: tuple[int, int] = (640, 360), seconds: float = 10.0, *, unknown: bool = False) -> bytes:
    """A sound track before the film's. `unknown`: of a length that was not known when it was begun."""
    info = element(
        0x1549A966, element(0x2AD7B1, (10**6).to_bytes(3, "big")), element(0x4489, struct.pack(">d", seconds * 1e3))
    )
    sound = element(0xAE, element(0xD7, b"\1"), element(0xE1, element(0xB5, struct.pack(">f", 48000.0))))
    video = element(0xE0, element(0xB0, size[0].to_bytes(2, "big")), element(0xBA, size[1].to_bytes(2, "big")))
    tracks = element(0x1654AE6B, sound, element(0xAE, element(0xD7, b"\2"), video))
    body = (element(0xEC, bytes(40)), info, tracks, element(0x1F43B675, bytes(500)))
    return element(0x1A45DFA3, element(0x4282, b"webm")) + element(0x18538067, *body, unknown=unknown)


def wav(seconds: float, rate: int = 16000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * round(seconds * rate)))
    return out.getvalue()


def flac(seconds: float, rate: int = 44100) -> bytes:
    bits = rate << 44 | 1 << 41 | 15 << 36 | round(seconds * rate)
    return b"fLaC" + b"\x80\0\0\x22" + bytes(10) + struct.pack(">Q", bits) + bytes(16)


def _page(granule: int, data: bytes) -> bytes:
    return b"OggS" + struct.pack("<BBqIIIB", 0, 0, granule, 1, 0, 0, 1) + bytes([min(255, len(data))]) + data


def opus(seconds: float, filler: int = 0) -> bytes:
    """`filler`: bytes between the first page and the last."""
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 312, 16000, 0, 0)
    return _page(0, head) + bytes(filler) + _page(round(seconds * 48000) + 312, b"end")


def vorbis(seconds: float, rate: int = 22050) -> bytes:
    head = b"\x01vorbis" + struct.pack("<IBIiiiBB", 0, 1, rate, 0, 64000, 0, 0xB8, 1)
    return _page(0, head) + _page(round(seconds * rate), b"end")


def mp3(frames: int, *, counted: bool = False, picture: int = 0) -> bytes:
    """Of 128 kbit/s at 44,100 Hz, 417 bytes a frame. `counted`: the first frame tells how many there are. `picture`:
    bytes of an ID3 tag before them."""
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    tag = b"Xing" + struct.pack(">II", 1, frames)
    first = frame[:36] + tag + frame[36 + len(tag) :] if counted else frame
    sizes = bytes(picture >> shift & 127 for shift in (21, 14, 7, 0))
    start = b"ID3\4\0\0" + sizes + bytes(picture) if picture else b""
    return start + first + frame * (frames - 1)
