"""Pixels equal those of `transformers`, whatever the file; files made to hurt are refused undecoded."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from engines.encoder.media import ImageReader, MediaPool, MediaReader
from engines.encoder.request import MediaItem
from engines.errors import BadRequest, TooLarge
from engines.settings import EncoderSettings
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.pictures import draw, image_file


@cache
def processor(family: str) -> Any:
    return AutoImageProcessor.from_pretrained(checkpoint(family))


def reader(family: str = "qwen2_vl", **changes: Any) -> ImageReader:
    return ImageReader(checkpoint(family), EncoderSettings(model=Path("m"), **changes))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(draw(90, 60, seed=orientation), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [draw(70, 50, seed=n, mode="P") for n in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bit() -> bytes:
    ramp = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27
    return saved(Image.fromarray(ramp), "PNG")


def transparent_palette() -> bytes:
    return saved(draw(64, 48, mode="P"), "PNG", transparency=bytes(range(256)))


def with_alpha(mode: str) -> Image.Image:
    image = draw(80, 50, seed=4, mode=mode)
    image.putalpha(Image.linear_gradient("L").resize((80, 50)))
    return image


FILES: dict[str, Callable[[], bytes]] = {
    "png": lambda: image_file(96, 64),
    "jpeg": lambda: image_file(101, 67, format="JPEG"),
    "webp": lambda: image_file(77, 91, format="WEBP"),
    "bmp": lambda: image_file(64, 64, format="BMP"),
    "tiff": lambda: image_file(64, 80, format="TIFF"),
    "gif": lambda: image_file(60, 60, format="GIF", mode="P"),
    "gif-animated": animated,
    "rgba": lambda: saved(with_alpha("RGB"), "PNG"),
    "rgba-webp": lambda: saved(with_alpha("RGB"), "WEBP", lossless=True),
    "la": lambda: saved(with_alpha("L"), "PNG"),
    "l": lambda: image_file(64, 64, mode="L"),
    "1": lambda: image_file(64, 64, mode="1"),
    "palette": lambda: image_file(64, 48, mode="P"),
    "palette-transparent": transparent_palette,
    "16-bit": sixteen_bit,
    "cmyk": lambda: image_file(64, 48, format="JPEG", mode="CMYK"),
    "tiny": lambda: image_file(1, 1),
    "wide": lambda: image_file(800, 5),
    "large": lambda: image_file(2000, 1500),
    **{f"exif-{n}": (lambda n=n: rotated(n)) for n in range(1, 9)},
}


# transformers' own conversion warns about palettes with transparency; the pixels are what counts here
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_transformers(name: str) -> None:
    data = FILES[name]()
    for family in FAMILIES[:1] if name == "large" else FAMILIES:
        expected = processor(family)(images=[load_image(Image.open(io.BytesIO(data)))], return_tensors="pt")
        got = reader(family).read(data, {})
        assert torch.equal(got.pixels, expected["pixel_values"])
        assert list(got.grid) == expected["image_grid_thw"][0].tolist()
        assert got.pixels.shape[0] == got.patches == got.tokens * 4


@pytest.mark.parametrize("size", [{"longest_edge": 28 * 28 * 4}, {"shortest_edge": 28 * 28 * 64}])
def test_bounds_of_a_request_are_those_of_the_processor(size: dict[str, int]) -> None:
    data = image_file(120, 90)
    expected_size = {**dict(processor("qwen2_vl").size), **size}
    expected = processor("qwen2_vl")(
        images=[load_image(Image.open(io.BytesIO(data)))], size=expected_size, return_tensors="pt"
    )
    got = reader().read(data, size)
    assert torch.equal(got.pixels, expected["pixel_values"])
    assert got.grid != reader().read(data, {}).grid


def test_one_reader_serves_many_threads() -> None:
    it, files = reader(), [image_file(40 + n, 60, seed=n) for n in range(16)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda data: it.read(data, {}).pixels, files))
    for data, pixels in zip(files, together, strict=True):
        assert torch.equal(pixels, it.read(data, {}).pixels)


# ---- broken files


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        image_file()[:200],
        image_file(format="JPEG")[:400],
        image_file(format="WEBP")[:100],
        image_file(format="GIF", mode="P")[:40],
        image_file(format="TIFF")[:60],
        png_of_size(100, 100),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>",
    ],
)
def test_a_broken_image_says_so(data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        reader().read(data, {})
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_is_a_server_error(seed: int) -> None:
    """Flip bytes anywhere: the answer is pixels or a 4xx, never anything else."""
    dice = np.random.default_rng(seed)
    format = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")[seed % 6]
    data = bytearray(image_file(64, 48, format=format, mode="P" if format == "GIF" else "RGB"))
    for position in dice.integers(0, len(data), 8):
        data[position] = dice.integers(256)
    try:
        reader(max_media_pixels=10_000, max_item_patches=400).read(bytes(data), {})
    except BadRequest as error:
        assert error.code in ("invalid_image", "image_too_large")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match="--max-media-pixels"):
        reader().read(png_of_size(width, height), {})


def test_the_pixel_limit_is_ours_not_the_librarys() -> None:
    with pytest.raises(BadRequest, match="cannot be decoded"):
        reader(max_media_pixels=10**9).read(png_of_size(20_000, 20_000), {"longest_edge": 10_000})


@pytest.mark.parametrize(
    ("data", "size", "says"),
    [
        (image_file(402, 2), {}, "sides beyond 1:200"),
        (image_file(64, 64), {"shortest_edge": 10**9}, "--max-item-patches"),
    ],
)
def test_shapes_that_no_tower_takes(data: bytes, size: dict[str, int], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        reader().read(data, size)


# ---- the pool


async def test_the_pool_returns_results_and_errors() -> None:
    pool = MediaPool(2, timeout=10)
    try:
        assert await asyncio.gather(*(pool.run(lambda n=n: n * n) for n in range(5))) == [0, 1, 4, 9, 16]
        with pytest.raises(BadRequest, match="broken"):
            await pool.run(lambda: reader_of(BadRequest("broken")))
    finally:
        pool.close()


def reader_of(error: Exception) -> None:
    raise error


async def test_a_task_over_its_time_fails_and_the_pool_goes_on() -> None:
    pool, release = MediaPool(1, timeout=0.05), threading.Event()
    try:
        with pytest.raises(BadRequest, match="--decode-timeout") as caught:
            await pool.run(lambda: release.wait(30))
        assert caught.value.code == "image_timeout"
        release.set()
        assert await pool.run(lambda: 1) == 1
    finally:
        release.set()
        pool.close()


async def test_waiting_for_a_thread_is_not_held_against_a_task_and_a_cancelled_one_never_runs() -> None:
    pool, release, ran = MediaPool(1, timeout=10), threading.Event(), []
    try:
        async with asyncio.timeout(20):
            first = asyncio.create_task(pool.run(lambda: release.wait(30)))
            second = asyncio.create_task(pool.run(lambda: ran.append("second")))
            third = asyncio.create_task(pool.run(lambda: ran.append("third")))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            release.set()
            await asyncio.gather(first, third)
        assert ran == ["third"]
    finally:
        release.set()
        pool.close()


def test_a_readers_numbers_are_those_of_the_checkpoint() -> None:
    told = reader("qwen3_vl").numbers()
    assert told == {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 4096, "longest_edge": 1024 * 1024},
    }


def test_a_file_is_read_as_what_its_request_calls_it() -> None:
    it, data = MediaReader(checkpoint("qwen3_vl"), EncoderSettings(model=Path("m"))), animated()
    still, film = (it.read(data, MediaItem(0, "p", "u", modality=modality)) for modality in ("image", "video"))
    assert still.clip is None and film.clip is not None
    assert still.grid[0] == 1 and film.grid[0] == 2
    told = it.numbers()
    assert told["image_processor"] == reader("qwen3_vl").numbers()
    assert told["video_processor"]["temporal_patch_size"] == 2
