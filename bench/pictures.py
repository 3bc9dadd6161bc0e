"""Real image files drawn on the spot: each seed another picture, each format through its real encoder."""

from __future__ import annotations

import base64
import io
import random

from PIL import Image, ImageDraw


def draw(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture with structure at several scales, so that no two seeds look alike to a vision tower."""
    dice = random.Random(seed)
    picture = Image.new("RGB", (width, height), tuple(dice.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(24):
        x, y = dice.randrange(width), dice.randrange(height)
        size = dice.randrange(4, max(5, min(width, height) // 2))
        colour = tuple(dice.randrange(256) for _ in range(3))
        shape = pen.ellipse if dice.random() < 0.5 else pen.rectangle
        shape((x, y, x + size, y + size), fill=colour)
    return picture.convert(mode)


def image_file(width: int = 96, height: int = 64, seed: int = 0, format: str = "PNG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    draw(width, height, seed, mode).save(out, format)
    return out.getvalue()


def noise_file(nbytes: int, dice: random.Random) -> bytes:
    """A PNG of about `nbytes`, for proxies that decode what they pass on: noise, which does not get smaller."""
    side = max(1, round((nbytes / 3) ** 0.5))
    out = io.BytesIO()
    Image.frombytes("RGB", (side, side), dice.randbytes(3 * side * side)).save(out, "PNG", compress_level=0)
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, mime: str = "image/png") -> dict[str, object]:
    """An OpenAI content part that carries the file inline."""
    return {"type": "image_url", "image_url": {"url": data_url(data, mime)}}
