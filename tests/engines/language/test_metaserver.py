from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from engines.errors import DeadlineExceeded, EngineError
from engines.language.metaserver import Metaserver
from tests.support.metaserver import metaserver


async def call(url: str, timeout: float = 5.0) -> None:
    async with aiohttp.ClientSession() as session:
        await Metaserver(session, timeout).call(url, {"request_id": "chatcmpl-1"})


async def test_it_posts_the_descriptor_and_returns_on_200() -> None:
    seen: list[dict[str, Any]] = []

    async def agree(descriptor: dict[str, Any]) -> tuple[int, Any]:
        seen.append(descriptor)
        return 200, {"status": "ok"}

    async with metaserver(agree) as url:
        await call(url)
    assert seen == [{"request_id": "chatcmpl-1"}]


async def test_it_passes_a_refusal_on() -> None:
    async def refuse(_: dict[str, Any]) -> tuple[int, Any]:
        return 404, {"error": {"message": "nobody waits for that id", "stage": "proxy", "code": "unknown_request"}}

    async with metaserver(refuse) as url:
        with pytest.raises(EngineError, match="nobody waits") as raised:
            await call(url)
    assert (raised.value.status, raised.value.stage, raised.value.code) == (404, "proxy", "unknown_request")


async def test_nobody_is_there() -> None:
    async with metaserver(lambda _: asyncio.sleep(0, (200, None))) as url:
        pass
    with pytest.raises(EngineError) as raised:
        await call(url)
    assert (raised.value.stage, raised.value.code) == ("prefill", "metaserver_unreachable")
    assert raised.value.retryable


async def test_nobody_answers() -> None:
    async def silent(_: dict[str, Any]) -> tuple[int, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async with metaserver(silent) as url:
        with pytest.raises(DeadlineExceeded, match="--metaserver-timeout") as raised:
            await call(url, timeout=0.1)
    assert raised.value.stage == "prefill"
