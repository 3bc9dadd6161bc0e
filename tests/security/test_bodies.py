"""Bodies made to cost more than they weigh, sent to a whole proxy: refused, and the next request is served."""

from __future__ import annotations

import gzip
import resource
import zlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import zstandard

from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat, image, part

LIMITS: dict[str, Any] = {
    "max_body_bytes": 8 << 20, "max_text_bytes": 1 << 20, "max_items": 4, "max_pixels": 1_000_000, "max_json_depth": 50,
}  # fmt: skip


@pytest.fixture
async def d() -> AsyncIterator[Deployment]:
    """Afterwards it serves as ever."""
    async with deployment("1e1b", **LIMITS) as found:
        yield found
        assert (await found.post(chat(part(image())))).status == 200


async def refused(d: Deployment, body: Any, status: int, code: str, **headers: str) -> None:
    answer = await d.post(body, **headers)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert not any(engine.calls for engine in d.engines)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 5_000_000,
        b'{"messages":' * 500_000,
        b'{"messages":[],"x":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"messages":[],"x":' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
    ],
    ids=["lists", "objects", "closed lists", "closed objects"],
)
async def test_deep_json(d: Deployment, body: bytes) -> None:
    answer = await d.post(body)
    assert answer.status == 400 and answer.error["code"] in ("invalid_request", "nested_too_deep")


@pytest.mark.parametrize("where", ["prompt", "tools", "system"])
async def test_more_text_than_anybody_reads(d: Deployment, where: str) -> None:
    text = "x" * (1 << 20) + "y"
    given: dict[str, Any] = {"tools": [text]} if where == "tools" else {}
    body = chat(text=text if where == "prompt" else "x", **given)
    if where == "system":
        body["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": text}]})
    await refused(d, body, 413, "text_too_large")


async def test_more_items_than_anybody_sends(d: Deployment) -> None:
    await refused(d, chat(*[part(image())] * 5), 413, "too_many_items")


async def test_a_body_that_is_too_large_is_refused_by_what_it_announces(d: Deployment) -> None:
    await refused(d, b" " * (9 << 20), 413, "body_too_large")


def bomb(pack: Any, size: int = 64 << 20) -> bytes:
    """`size` zeros in a thousandth of that."""
    return b"".join([*(pack.compress(bytes(1 << 20)) for _ in range(size >> 20)), pack.flush()])


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", bomb(zlib.compressobj(9, zlib.DEFLATED, 31))),
        ("zstd", bomb(zstandard.ZstdCompressor().compressobj())),
        ("gzip", gzip.compress(b"") * 60_000 + gzip.compress(bytes(9 << 20))),
    ],
    ids=["gzip", "zstd", "many members"],
)
async def test_bombs_of_compression(d: Deployment, coding: str, data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await refused(d, data, 413, "body_too_large", content_encoding=coding)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 96 << 20, "nothing near what it would unpack to"


async def test_more_members_than_anybody_needs(d: Deployment) -> None:
    """Each takes the proxy's time, and none of the size that it may unpack to."""
    await refused(d, gzip.compress(b"") * 100_000, 400, "bad_http", content_encoding="gzip")


async def test_a_zstd_frame_that_wants_a_huge_window(d: Deployment) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    await refused(d, packed.compress(b"{}") + packed.flush(), 400, "bad_http", content_encoding="zstd")


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "deflate", "x" * 100])
async def test_codings_that_are_not_spoken(d: Deployment, coding: str) -> None:
    await refused(d, b"{}", 415, "content_encoding", content_encoding=coding)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
async def test_bombs_of_pixels(d: Deployment, kind: str) -> None:
    """Their headers tell of gigabytes; nobody decodes them to find out."""
    picture = bytearray(image(8, 8, kind))
    at, size, order = {"PNG": (16, 4, "big"), "GIF": (6, 2, "little"), "BMP": (18, 4, "little")}[kind]
    picture[at : at + 2 * size] = (60_000).to_bytes(size, order) * 2  # type: ignore[arg-type]
    await refused(d, chat(part(bytes(picture))), 413, "too_many_pixels")


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params", "prompt_embeds"])
async def test_fields_that_are_the_proxys_own(d: Deployment, field: str) -> None:
    await refused(d, chat(**{field: {}}), 400, "forbidden_field")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b"\xff", b'{"messages":3}', b'{"messages":[]', b'{"messages":[],"stream":3}', b'"x"'),
        *(b'{"messages":[{"content":[{"type":"image_url","image_url":null,"uuid":"a"}]}]}', b"{" + b'"a":1,' * 10_000),
    ],
)
async def test_what_is_no_request(d: Deployment, body: bytes) -> None:
    answer = await d.post(body)
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "odd",
    [
        *({"type": []}, {"type": {}, "image_url": 3}, {"type": "text", "text": {}}, {"type": "image_url"}, {"a": None}),
        *(None, 7, [], "x"),
    ],
    ids=str,
)
async def test_odd_parts_are_no_500(d: Deployment, odd: Any) -> None:
    body = {"model": "tiny", "messages": [odd, {"role": "user", "content": [odd, odd]}], "n": [], "max_tokens": {}}
    assert (await d.post(orjson.dumps(body))).status in (200, 400)
