"""Turns the bytes of an image into the patches a vision tower reads, and has the pool of threads for that. It fetches
nothing; `video` reads videos.

The pixels are by construction those of `transformers`: its `load_image` (EXIF rotation, then RGB) and the
checkpoint's own image processor do the work. What stands here are the limits that must hold before them: formats,
pixels as the header states them, aspect ratio, patches after resizing.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image

from engines.encoder.cutting import Prepared, cutter_of
from engines.encoder.request import MediaItem
from engines.encoder.video import VideoReader
from engines.errors import BadRequest, TooLarge
from engines.settings import EncoderSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ASPECT_RATIO = 200  # where the Qwen processors give up

# Pillow warns at 89 million pixels and refuses at twice that, for the whole process. Our own limit is checked on the
# same number, the size in the header, before a pixel is decoded, and is a flag.
Image.MAX_IMAGE_PIXELS = None

ResultT = TypeVar("ResultT")


class MediaReader:
    """Images and videos, for one checkpoint. Thread-safe. Raises SetupError, OSError or ValueError."""

    def __init__(self, folder: Path, settings: EncoderSettings) -> None:
        self._images = ImageReader(folder, settings)
        self._videos = VideoReader(folder, settings)

    def numbers(self) -> dict[str, Any]:
        """How the processors cut media, for whoever predicts their tokens. JSON."""
        return {"image_processor": self._images.numbers(), "video_processor": self._videos.numbers()}

    def read(self, data: bytes, item: MediaItem) -> Prepared:
        """Raises BadRequest or TooLarge, with a code that names the modality."""
        if item.modality == "video":
            return self._videos.read(data, item.size, item.sampling)
        return self._images.read(data, item.size)


class ImageReader:
    """Decodes and preprocesses for one checkpoint. Thread-safe.

    `size`: the pixel bounds of a request, {"shortest_edge", "longest_edge"}, in pixels²; absent: the checkpoint's.
    """

    def __init__(self, folder: Path, settings: EncoderSettings) -> None:
        self._cutter = cutter_of(folder)
        self._max_pixels = settings.max_media_pixels
        self._max_patches = settings.max_item_patches

    def numbers(self) -> dict[str, Any]:
        """How the processor cuts an image, for whoever predicts its tokens. JSON."""
        return self._cutter.numbers()

    def read(self, data: bytes, size: Mapping[str, int]) -> Prepared:
        """Raises BadRequest (`invalid_image`) or TooLarge (`image_too_large`)."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                self._check(image, size)
                picture = load_image(image)
        except (BadRequest, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's decoders raise whatever they stumble over
            raise BadRequest(self._broken(data, error), code="invalid_image") from None
        return self._cutter.cut(picture, size)

    def _check(self, image: Image.Image, size: Mapping[str, int]) -> None:
        width, height = image.size
        if width * height > self._max_pixels:
            limit = f"{self._max_pixels} pixels (--max-media-pixels)"
            raise TooLarge(f"the image is {width}x{height}, more than {limit}", code="image_too_large")
        if not width or not height or max(width, height) / min(width, height) > ASPECT_RATIO:
            raise BadRequest(f"the image is {width}x{height}: sides beyond 1:{ASPECT_RATIO}", code="invalid_image")
        patches = self._cutter.patches(width * height, size)
        if patches > self._max_patches:
            limit = f"{self._max_patches} (--max-item-patches)"
            raise TooLarge(f"the image makes about {patches} patches, more than {limit}", code="image_too_large")

    def _broken(self, data: bytes, error: Exception) -> str:
        if not data:
            return "the image is empty"
        if isinstance(error, UnidentifiedImageError):
            return f"the image is none of {', '.join(FORMATS)}"
        return f"the image cannot be decoded: {error or type(error).__name__}"


class MediaPool:
    """`workers` threads. A thread cannot be stopped: a task over its time fails, and its thread is back when it ends.

    What bounds that time is the limits that `ImageReader` checks first.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="media")
        self._timeout = timeout

    async def run(self, function: Callable[[], ResultT], what: str = "image") -> ResultT:
        """The function's result or exception. Waiting for a thread is not counted against the time limit.

        Raises BadRequest (`image_timeout`, where `what` is an image). A cancelled call that no thread has begun is
        never run.
        """
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()

        def call() -> ResultT:
            loop.call_soon_threadsafe(begun.set)
            return function()

        future = asyncio.wrap_future(self._threads.submit(call))
        try:
            await begun.wait()
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            seconds = f"{self._timeout:g} s (--decode-timeout)"
            raise BadRequest(f"the {what} was not decoded within {seconds}", code=f"{what}_timeout") from None
        finally:
            future.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
