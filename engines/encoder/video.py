"""Turns the bytes of a video into the patches a vision tower reads. It fetches nothing; `frames` has the rules.

The container says how long the video is, its frames are counted while they are decoded, one by one and in order; of the
chosen ones nothing is kept but what is left after resizing. The format is told from the first bytes and named to the
demuxer, as some of libav's others (playlists, for one) would open what the file names: other files, and the network.
"""

from __future__ import annotations

import ctypes
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import av._core
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from transformers import AutoConfig

from engines.encoder.cutting import Prepared
from engines.encoder.frames import Film, film_cutter_of
from engines.errors import BadRequest, EngineError, TooLarge
from engines.families import merge_size
from engines.settings import EncoderSettings

FORMATS = "MP4, MOV, WebM, Matroska, AVI, GIF"
_STREAMS = 32  # of a file, that are looked at
_FASTEST = 1000  # frames a second
_LEAST_ALLOCATION = 64 << 20  # bytes that libav may always ask for at once


class VideoReader:
    """Decodes, samples and preprocesses for one checkpoint. Thread-safe.

    `size`: the pixel bounds of a request, as for images. `sampling`: its own {"fps"} or {"num_frames"}, or empty.
    """

    def __init__(self, folder: Path, settings: EncoderSettings) -> None:
        config = AutoConfig.from_pretrained(folder)
        self._cutter = film_cutter_of(folder, config)
        self._merge = merge_size(config)
        self._settings = settings
        _limit_allocations(settings.max_media_bytes + 4 * settings.max_media_pixels)

    def numbers(self) -> dict[str, Any]:
        """How the processor samples and sizes a video, for whoever predicts its tokens. JSON."""
        return self._cutter.numbers()

    def read(self, data: bytes, size: Mapping[str, int], sampling: Mapping[str, float]) -> Prepared:
        """Raises BadRequest (`invalid_video`, `video_timeout`) or TooLarge (`video_too_large`)."""
        deadline = time.monotonic() + self._settings.decode_timeout
        try:
            film = self._film(data)
            for _ in range(2):
                chosen = self._chosen(film, sampling)
                edges = self._edges(film, len(chosen), size)
                frames, seen = self._frames(data, film, chosen, edges, deadline)
                if len(frames) == len(chosen):
                    return self._prepared(film, chosen, torch.stack(frames))
                film = replace(film, frames=seen)  # the container promised more than it holds
        except EngineError:
            raise
        except Exception as error:  # on hostile bytes libav raises whatever it stumbles over
            if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
                raise  # ours, and not what libav says of sizes that make no sense
            raise BadRequest(f"the video cannot be decoded: {_told(error)}", code="invalid_video") from None
        raise BadRequest("the video's frames cannot be counted", code="invalid_video")

    def _film(self, data: bytes) -> Film:
        with self._opened(data) as (container, stream):
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            most = int(self._settings.max_video_seconds * _FASTEST) + 1
            frames = stream.frames or sum(packet.size > 0 for packet in islice(container.demux(stream), most))
            film = Film(frames, fps, stream.width, stream.height)
        if not (frames > 0 and 0 < fps <= _FASTEST and film.width > 0 and film.height > 0):
            told = f"{frames} frames of {film.width}x{film.height} at {fps:g} a second"
            raise BadRequest(f"the video says that it has {told}", code="invalid_video")
        if film.width * film.height > self._settings.max_media_pixels:
            limit = f"{self._settings.max_media_pixels} pixels (--max-media-pixels)"
            raise TooLarge(f"the video is {film.width}x{film.height}, more than {limit}", code="video_too_large")
        if film.seconds > self._settings.max_video_seconds:
            limit = f"{self._settings.max_video_seconds:g} (--max-video-seconds)"
            raise TooLarge(f"the video lasts {film.seconds:.0f} s, more than {limit}", code="video_too_large")
        return film

    def _chosen(self, film: Film, sampling: Mapping[str, float]) -> list[int]:
        chosen = self._cutter.choose(film, sampling)
        if len(chosen) > self._settings.max_video_frames:
            limit = f"{self._settings.max_video_frames} (--max-video-frames): ask for less by fps or num_frames"
            raise TooLarge(
                f"{len(chosen)} frames of the video would be seen, more than {limit}", code="video_too_large"
            )
        return chosen

    def _edges(self, film: Film, count: int, size: Mapping[str, int]) -> tuple[int, int]:
        """What each frame is resized to, (height, width)."""
        edges = self._cutter.size(film, count, size)
        patches = math.prod(self._cutter.grid(count, edges))
        if patches > self._settings.max_item_patches:
            limit = (
                f"{self._settings.max_item_patches} (--max-item-patches): ask for less by fps, num_frames or max_pixels"
            )
            raise TooLarge(f"the video makes {patches} patches, more than {limit}", code="video_too_large")
        return edges

    def _frames(
        self, data: bytes, film: Film, chosen: list[int], edges: tuple[int, int], deadline: float
    ) -> tuple[list[torch.Tensor], int]:
        """The chosen frames as far as there are any, resized, and how many frames were decoded."""
        wanted, found, seen = set(chosen), [], 0
        with self._opened(data) as (container, stream):
            decoded = islice(self._decoded(container, stream, deadline), chosen[-1] + 1)
            for seen, frame in enumerate(decoded, 1):
                if seen - 1 not in wanted:
                    continue
                if (frame.width, frame.height) != (film.width, film.height):
                    raise BadRequest("the frames of the video differ in size", code="invalid_video")
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                found.append(self._cutter.resize(pixels, edges))
        if not seen:
            raise BadRequest("the video holds no frame that can be decoded", code="invalid_video")
        return found, seen

    def _decoded(self, container: InputContainer, stream: VideoStream, deadline: float) -> Iterator[av.VideoFrame]:
        """Packets may hold no frame that is shown: each of them is held against the clock."""
        for packet in container.demux(stream):
            if time.monotonic() > deadline:
                seconds = f"{self._settings.decode_timeout:g} s (--decode-timeout)"
                raise BadRequest(f"the video was not decoded within {seconds}", code="video_timeout")
            yield from packet.decode()

    def _prepared(self, film: Film, chosen: list[int], frames: torch.Tensor) -> Prepared:
        grid = self._cutter.grid(len(chosen), (frames.shape[2], frames.shape[3]))
        tokens = math.prod(grid) // self._merge**2
        return Prepared(self._cutter.cut(frames), grid, tokens, self._cutter.clip(film, chosen))

    @contextmanager
    def _opened(self, data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
        name = demuxer_of(data)
        if name is None:
            raise BadRequest(
                "the video is empty" if not data else f"the video is none of {FORMATS}", code="invalid_video"
            )
        bounds = {"max_pixels": str(self._settings.max_media_pixels)}  # while probing too, whatever the header says
        with _container(data, name, bounds) as container:
            if not container.streams.video:
                raise BadRequest("the file has no video in it", code="invalid_video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadRequest("the video's codec is not known", code="invalid_video")
            stream.codec_context.options = bounds
            yield container, stream


def _container(data: bytes, name: str, bounds: dict[str, str]) -> InputContainer:
    """Titles may be in any encoding, and are not read. Raises BadRequest, and what libav raises."""
    options: Any = [bounds] * _STREAMS
    try:
        container = av.open(io.BytesIO(data), format=name, stream_options=options, metadata_errors="replace")
    except av.FFmpegError:
        raise
    except ValueError as error:
        if "stream_options" in str(error):  # which there is no stream to give to
            raise BadRequest("the file has no video in it", code="invalid_video") from None
        raise
    assert isinstance(container, InputContainer)
    return container


def demuxer_of(data: bytes) -> str | None:
    """libav's name of what reads these bytes; None for what is not read here."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return "gif" if data[:6] in (b"GIF87a", b"GIF89a") else None


def _limit_allocations(nbytes: int) -> None:
    """Of libav, in this process: no single one is larger. A table of 16 bytes can claim so many frames that their index
    takes gigabytes; such a file has none then."""
    limit = max(nbytes, _LEAST_ALLOCATION)
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(limit))


def _told(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
