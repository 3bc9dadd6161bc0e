"""Decodes images before engines get them that an undecodable one would end: SGLang's language servers (0.5.23).

What is behind a URL is not fetched, and passes. Where the virtual encoder stands, encoders look first and nothing is
decoded here. Pillow is imported with the first image of such a fleet.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable

from proxy.core import Instance, Item, Job, Plan, Role
from proxy.dialects.base import Dialect
from proxy.errors import BadRequest
from proxy.media import splice
from proxy.media.splice import Cut
from proxy.relay import Sink
from proxy.sglang.wards import Work

_MOST_PIXELS = 178_956_970  # beyond twice its warning's limit, Pillow refuses, in the engine as well
_SMALL = 64  # pixels each way; a JPEG is decoded no finer than that, but to its end


class Pictures:
    """`dialects`: how each instance is spoken to."""

    def __init__(self, dialects: Callable[[Instance], Dialect]) -> None:
        self._dialects = dialects

    async def over(self, plan: Plan, job: Job, sink: Sink, work: Work) -> None:
        """Run `work` unless an image of `job` would end its engines. Raises BadRequest, and what `work` raises."""
        if any(self._dialects(leg.instance).verify_images for leg in plan.legs if leg.role is not Role.ENCODE):
            await asyncio.to_thread(check, job)
        await work(sink)


def check(job: Job) -> None:
    """Takes milliseconds per image. Raises BadRequest that names the first image which cannot be decoded."""
    for item in job.items:
        if item.modality == "image" and (data := _data(item)) is not None and (error := _flaw(data)):
            raise BadRequest(f"the image cannot be decoded: {error}", param=item.param, code="invalid_image")


def _data(item: Item) -> bytes | None:
    """The image's bytes; empty where the text is no base64, None where they are elsewhere."""
    value = item.content["image_url"]
    url = value["url"] if isinstance(value, dict) else value
    if isinstance(url, Cut):
        return splice.decode(url.text)
    head, comma, text = url.partition(",")
    if not comma or not head.startswith("data:"):
        return None
    return splice.decode(text) or b""


def _flaw(data: bytes) -> str:
    """Why `data` is no image; empty if it is one."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # its warning is a line per image; the limit is ours
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                return f"{width} x {height} pixels"
            image.draft("RGB", (_SMALL, _SMALL))
            image.load()
    except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's decoders raise whatever they stumble over
        return str(error) or type(error).__name__
    return ""
