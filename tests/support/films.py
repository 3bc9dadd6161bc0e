"""Real video files drawn on the spot: a bright square crosses a picture, and each seed is another film."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from bench.pictures import data_url, draw

CODECS = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "libx264", "matroska": "libvpx-vp9", "gif": "gif"}


@cache
def video_file(
    frames: int = 12, size: tuple[int, int] = (112, 80), fps: int = 6, seed: int = 0, container: str = "mp4"
) -> bytes:
    """`size`: (width, height), even numbers."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as film:
        stream = film.add_stream(CODECS[container], rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if container == "gif" else "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(_drawn(number / frames, size, seed)), format="rgb24")
            film.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        film.mux(stream.encode())
    return out.getvalue()


def _drawn(at: float, size: tuple[int, int], seed: int) -> Image.Image:
    picture = draw(*size, seed)
    x, y = at * size[0], (seed * 37 % 100) / 100 * size[1]
    ImageDraw.Draw(picture).rectangle((x, y, x + size[0] / 4, y + size[1] / 3), fill=(255, 255, int(255 * at)))
    return picture


def video_part(data: bytes, mime: str = "video/mp4") -> dict[str, Any]:
    """An OpenAI content part that carries the file inline."""
    return {"type": "video_url", "video_url": {"url": data_url(data, mime)}}
