"""Real video files of every container, read as they are; and files that are broken, too much or meant to hurt."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from engines.encoder.frames import Film
from engines.encoder.video import VideoReader, demuxer_of
from engines.errors import BadRequest, TooLarge
from engines.settings import EncoderSettings
from tests.support.checkpoints import checkpoint
from tests.support.films import CODECS, video_file
from tests.support.pictures import image_file


def reader(family: str = "qwen2_5_vl", **changes: Any) -> VideoReader:
    return VideoReader(checkpoint(family), EncoderSettings(model=Path("m"), **changes))


def decoded(data: bytes) -> list[torch.Tensor]:
    """Every frame, [3, height, width] of uint8, by PyAV's own way through a file."""
    with av.open(io.BytesIO(data)) as film:
        return [torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1) for f in film.decode(video=0)]


@pytest.mark.parametrize("container", CODECS)
def test_the_chosen_frames_are_seen(container: str) -> None:
    data = video_file(container=container)
    it = reader()
    got = it.read(data, {}, {"num_frames": 4})
    frames = torch.stack([it._cutter.resize(decoded(data)[n], (84, 112)) for n in (0, 3, 6, 9)])
    assert torch.equal(got.pixels, it._cutter.cut(frames))
    assert (got.grid, got.tokens, got.patches) == ((2, 6, 8), 24, 96)
    assert got.clip.timestamps == pytest.approx((0.25, 1.25), rel=0.05)
    assert got.clip.spacing == pytest.approx(1.0, rel=0.05)


def test_bounds_and_sampling_are_the_requests() -> None:
    it, data = reader(), video_file(24, fps=8)
    assert it.read(data, {}, {}).grid == (3, 6, 8)
    assert it.read(data, {"longest_edge": 56 * 56}, {}).grid == (3, 2, 4)
    assert it.read(data, {}, {"fps": 8}).grid[0] == 12


def test_titles_may_be_in_any_encoding() -> None:
    data = video_file(container="avi")
    titled = data.replace(b"Lavf", b"\xe9t\xe9\0")
    assert titled != data
    assert torch.equal(reader().read(titled, {}, {}).pixels, reader().read(data, {}, {}).pixels)


def test_one_reader_serves_many_threads() -> None:
    it, files = reader(), [video_file(seed=n) for n in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda data: it.read(data, {}, {}).pixels, files))
    for data, pixels in zip(files, together, strict=True):
        assert torch.equal(pixels, it.read(data, {}, {}).pixels)


def test_a_container_that_promises_too_many_frames_is_sampled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    it, data = reader(), video_file()
    expected = it.read(data, {}, {"num_frames": 4})
    monkeypatch.setattr(it, "_film", lambda data: Film(40, 6.0, 112, 80))
    got = it.read(data, {}, {"num_frames": 4})
    assert torch.equal(got.pixels, expected.pixels) and got.clip == expected.clip


def test_numbers_are_json_for_the_proxy() -> None:
    told = reader().numbers()
    assert told["fps"] == 2 and told["size"] == {"shortest_edge": 3136, "longest_edge": 802816}
    assert reader("internvl").numbers() == {"num_frames": 8}


# ---- limits


@pytest.mark.parametrize(
    ("changes", "sampling", "told"),
    [
        ({"max_media_pixels": 8000}, {}, "112x80, more than 8000 pixels"),
        ({"max_video_seconds": 1.5}, {}, r"lasts 2 s, more than 1\.5"),
        ({"max_video_frames": 3}, {}, "4 frames of the video would be seen, more than 3"),
        ({"max_item_patches": 100}, {"fps": 6}, "makes 288 patches, more than 100"),
    ],
    ids=["pixels", "seconds", "frames", "patches"],
)
def test_what_is_too_much_is_refused(changes: dict[str, Any], sampling: dict[str, float], told: str) -> None:
    with pytest.raises(TooLarge, match=told) as caught:
        reader(**changes).read(video_file(), {}, sampling)
    assert caught.value.code == "video_too_large"


def test_decoding_ends_at_its_deadline() -> None:
    with pytest.raises(BadRequest, match="--decode-timeout") as caught:
        reader(decode_timeout=1e-6).read(video_file(), {}, {})
    assert caught.value.code == "video_timeout"


# ---- broken files


def sound() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as film:
        stream = film.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        film.mux([*stream.encode(frame), *stream.encode()])
    return out.getvalue()


def claiming(frames: int) -> bytes:
    """An MP4 of less than a kilobyte, whose index says that a single chunk holds so many frames of a byte."""

    def box(kind: bytes, *content: bytes) -> bytes:
        return (8 + sum(map(len, content))).to_bytes(4) + kind + b"".join(content)

    def table(kind: bytes, *numbers: int) -> bytes:
        return box(kind, struct.pack(f">{1 + len(numbers)}I", 0, *numbers))

    entry = box(b"mp4v", bytes(24), struct.pack(">HH", 64, 64), bytes(50))
    times, chunks = table(b"stts", 1, frames, 1), table(b"stsc", 1, 1, frames, 1)
    sizes, places = table(b"stsz", 1, frames), table(b"stco", 1, 1000)
    samples = box(b"stbl", box(b"stsd", bytes(7), b"\1", entry), times, chunks, sizes, places)
    handler = box(b"hdlr", bytes(8), b"vide", bytes(13))
    media = box(b"mdia", table(b"mdhd", 0, 0, 1000, 10_000, 0), handler, box(b"minf", samples))
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"moov", box(b"trak", media)) + box(b"mdat", bytes(100))


def two_sizes() -> bytes:
    """MJPEG allows each frame its own."""
    small, large = (image_file(*size, format="JPEG") for size in ((64, 48), (128, 96)))
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as film:
        stream = film.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(8):
            packet = av.Packet(small if number < 2 else large)
            packet.stream, packet.pts, packet.dts = stream, number * 250, number * 250
            packet.time_base = Fraction(1, 1000)
            film.mux(packet)
    return out.getvalue()


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello, this is no video", "none of MP4"),
    "a picture": (image_file, "none of MP4"),
    "a playlist": (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", "none of MP4"),
    "a list of files": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "none of MP4"),
    "only a head": (lambda: video_file()[:40], "cannot be decoded"),
    "half a file": (lambda: video_file(container="mp4")[:3000], "cannot be decoded"),
    "sound alone": (sound, "no video in it"),
    "no stream at all": (lambda: video_file(container="avi").replace(b"LIST", b"JUNK", 1), "no video in it"),
    "a codec that nobody knows": (lambda: video_file().replace(b"avc1", b"what"), "codec is not known"),
    "frames of two sizes": (two_sizes, "differ in size"),
    "nothing behind the head": (lambda: b"\x1a\x45\xdf\xa3" + bytes(200), "cannot be decoded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_the_reason(name: str) -> None:
    make, told = BROKEN[name]
    with pytest.raises(BadRequest, match=told) as caught:
        reader().read(make(), {}, {})
    assert caught.value.code == "invalid_video"


@pytest.mark.parametrize("container", ["mp4", "webm", "avi", "gif"])
def test_damaged_bytes_end_in_frames_or_in_an_error_of_ours(container: str) -> None:
    whole, it = video_file(container=container), reader(max_media_pixels=20_000, max_video_seconds=30)
    dice = np.random.default_rng(5)
    for _ in range(12):
        data = bytearray(whole)
        for place in dice.integers(0, len(data), 20):
            data[place] = dice.integers(0, 256)
        try:
            assert it.read(bytes(data), {}, {}).tokens > 0
        except BadRequest as error:
            assert error.code in ("invalid_video", "video_too_large")


def test_a_small_file_cannot_claim_a_large_index() -> None:
    it = reader(max_media_pixels=20_000, max_media_bytes=1 << 20)
    with it._opened(claiming(1_000_000)) as (_, stream):
        assert len(stream.index_entries) == 1_000_000
    with it._opened(claiming(4_000_000)) as (_, stream):  # of 24 bytes each
        assert len(stream.index_entries) == 0
    with pytest.raises(BadRequest, match="4000000 frames"):
        it.read(claiming(4_000_000), {}, {})


def test_formats_that_name_other_files_are_none_of_ours() -> None:
    for head in (b"#EXTM3U\n", b"ffconcat version 1.0\n", b"<?xml version", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n"):
        assert demuxer_of(head + bytes(64)) is None
