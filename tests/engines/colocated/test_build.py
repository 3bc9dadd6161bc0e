"""All three stages in one process: exact answers to raw media, one encoder for itself and others, nothing held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from engines.colocated.build import build
from engines.serve import running
from engines.settings import ColocatedSettings
from tests.support.checkpoints import checkpoint
from tests.support.cluster import Client, busy_parts
from tests.support.waiting import eventually
from tests.system.cases import CASES, MAX_TOKENS

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAMILY = "qwen3_vl"


def settings(**changes: Any) -> ColocatedSettings:
    fields = {"model": checkpoint(FAMILY), "served_model_name": "tiny", "port": 0, "dtype": "float32", "encode": True}
    fields |= {"kv_blocks": 256, "max_batched_tokens": 64, "prefix_cache": False, "encoder_port": 0}
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_raw_media_are_answered_exactly(engine: Client, case: Any) -> None:
    whole, streamed = await asyncio.gather(
        engine.chat(case.content, max_tokens=MAX_TOKENS), engine.chat(case.content, max_tokens=MAX_TOKENS, stream=True)
    )
    assert whole.status == 200, whole.error
    assert whole.text == streamed.text == case.expected(FAMILY)
