"""All three stages in one process: exact answers to raw media, one encoder for itself and others, nothing held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import ValidationError

from bench.soak import busy_parts
from engines.colocated.build import build
from engines.serve import running
from engines.settings import ColocatedSettings
from tests.support.checkpoints import checkpoint
from tests.support.cluster import Client
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually, until
from tests.system.cases import CASES, MAX_TOKENS, Case
from tests.system.videos import VIDEOS, VideoCase

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAMILY = "qwen3_vl"


def settings(**changes: Any) -> ColocatedSettings:
    fields = {"model": checkpoint(FAMILY), "served_model_name": "tiny", "port": 0, "dtype": "float32", "encode": True}
    fields |= {"kv_blocks": 256, "max_batched_tokens": 64, "prefix_cache": False, "encoder_port": 0}
    fields |= {"encoder_device": "cpu,cpu"}
    return ColocatedSettings(**{**fields, **changes})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Client]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        app = await stack.enter_async_context(build(settings()))
        client = Client(session, await stack.enter_async_context(running(app, settings())))
        yield client

        async def rests() -> bool:
            info = await client.get("/info")
            return not busy_parts(info) and not info["encoder"]["cache"]["pinned"]

        await eventually(rests)
        assert (await client.get("/audit"))["balanced"]


@pytest.mark.parametrize("case", [*CASES, VIDEOS[1]], ids=lambda case: case.name)
async def test_raw_media_are_answered_exactly(engine: Client, case: Case | VideoCase) -> None:
    whole, streamed = await asyncio.gather(
        engine.chat(case.content, max_tokens=MAX_TOKENS), engine.chat(case.content, max_tokens=MAX_TOKENS, stream=True)
    )
    assert whole.status == 200, whole.error
    assert whole.text == streamed.text == case.expected(FAMILY)


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


async def test_the_encoder_serves_others_beside_it(engine: Client) -> None:
    """As an encoder of its own would; and what it has encoded for others need not be encoded again."""
    info = await engine.get("/info")
    assert info["encodes"] and info["vision"]["model_type"].startswith(FAMILY)
    encoder = Client(engine._session, info["encoder"]["url"])
    assert (await encoder.get("/info"))["role"] == "encode"
    part = image_part(image_file(80, 64, seed=11))
    ((mm_hash, entry),) = (await encoder.chat([part])).body["ec_transfer_params"].items()
    embeds = {"type": "image_embeds", "image_embeds": entry["metadata"], "uuid": mm_hash}
    sent = await engine.chat([embeds, text("What is it?")], max_tokens=4, ec_transfer_params={mm_hash: entry})
    raw = await engine.chat([part, text("What is it?")], max_tokens=4)
    assert sent.status == raw.status == 200, (sent.error, raw.error)
    assert sent.text == raw.text
    told = await engine.text("/metrics")
    assert 'triptych_encode_cache_total{result="hit"}' in told and "triptych_per_token_seconds" in told


async def test_media_that_cannot_be_read_are_refused_with_their_place(engine: Client) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = await engine.chat([text("What is it?"), broken])
    assert answer.error is not None
    assert (answer.status, answer.error["code"], answer.error["stage"]) == (400, "invalid_image", "encode")
    assert answer.error["param"] == "messages[0].content[1]"


async def test_whoever_leaves_while_media_are_encoded_leaves_nothing_behind(engine: Client) -> None:
    parts = [image_part(image_file(400, 400, seed=20 + n)) for n in range(3)]
    with pytest.raises(TimeoutError):
        await engine.chat([*parts, text("Compare.")], timeout=0.05)


@pytest.mark.parametrize(("name", "value"), [("encoder_port", 5), ("encoder_device", "cpu")])
async def test_flags_of_an_encoder_that_is_not_there_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"--{name.replace('_', '-')} needs --encode"):
        settings(**{"encode": False, "encoder_port": None, "encoder_device": None, name: value})


async def test_the_encoder_registers_itself_at_its_own_port_and_leaves() -> None:
    said: list[tuple[str, dict[str, Any]]] = []

    async def hear(request: web.Request) -> web.Response:
        said.append((request.path, await request.json()))
        return web.json_response({"registered": True})

    async with AsyncExitStack() as stack:
        heard = web.Application()
        heard.add_routes([web.post("/instances", hear), web.post("/instances/drain", hear)])
        proxy = await stack.enter_async_context(TestServer(heard))
        own = settings(proxies=(f"http://127.0.0.1:{proxy.port}",))
        async with build(own) as app:
            await until(lambda: bool(said))
            path, body = said[0]
            assert (path, body["role"], body["url"]) == ("/instances", "encode", app.encoder_url)
        assert said[-1] == ("/instances/drain", {"url": app.encoder_url})
    with pytest.raises(ValidationError, match="leave one of them out"):
        settings(proxies=("http://p:1",), advertise="http://e:1")
