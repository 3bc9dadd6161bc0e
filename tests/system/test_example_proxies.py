"""Our engines behind other people's proxies: they speak the same wire, and answer exactly as behind our own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.fakes.example_proxies import Epd, Layerwise, PrefillFirst, Sent
from tests.support.cluster import Cluster, cluster
from tests.system.cases import CASES, MAX_TOKENS, Case

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen3_vl"
TEXT = CASES[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Cluster]:
    async with cluster(FAMILY, "1e1p1d") as deployment:
        yield deployment


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


def body(case: Case, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": case.content}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **fields}


def said(sent: Sent) -> str:
    """The text of an answer, streamed or not."""
    assert sent.status == 200, sent.text
    if not sent.text.startswith("data: "):
        return str(sent.body["choices"][0]["message"]["content"])
    *events, done = [event.removeprefix("data: ") for event in sent.text.strip().split("\n\n")]
    assert done == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


def urls(engines: Cluster, *roles: str) -> list[str]:
    return [engines.engine(role).url for role in roles]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_vllms_proxy_gets_exact_answers_of_encoder_prefill_and_decode(
    engines: Cluster, session: aiohttp.ClientSession, case: Case, stream: bool
) -> None:
    proxy = Epd(session, *urls(engines, "encode", "prefill", "decode"))
    assert said(await proxy.ask(body(case, stream=stream))) == case.expected(FAMILY)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("proxy", [Layerwise, PrefillFirst])
async def test_ascends_proxies_get_exact_answers_of_prefill_and_decode(
    engines: Cluster, session: aiohttp.ClientSession, proxy: type[Layerwise] | type[PrefillFirst], stream: bool
) -> None:
    asked = proxy(session, *urls(engines, "prefill", "decode"))
    assert said(await asked.ask(body(TEXT, stream=stream, max_completion_tokens=MAX_TOKENS))) == TEXT.expected(FAMILY)


@pytest.mark.parametrize("proxy", [Layerwise, PrefillFirst])
async def test_ascends_proxies_get_completions_too(
    engines: Cluster, session: aiohttp.ClientSession, proxy: type[Layerwise] | type[PrefillFirst]
) -> None:
    asked = proxy(session, *urls(engines, "prefill", "decode"))
    plain = {"model": "tiny", "prompt": "It was a dark and stormy night", "temperature": 0, "max_tokens": MAX_TOKENS}
    sent = await asked.ask(plain, "/v1/completions")
    direct = await engines.post("/v1/completions", plain)
    assert sent.status == direct.status == 200, sent.text
    assert sent.body["choices"][0]["text"] == direct.text


async def test_a_prefill_that_fails_behind_the_metaserver_is_the_clients_error(
    engines: Cluster, session: aiohttp.ClientSession
) -> None:
    """vLLM-Ascend's own engines wait for ever here."""
    (decode,) = urls(engines, "decode")
    sent = await Layerwise(session, f"{decode}/nowhere", decode).ask(body(TEXT))
    assert (sent.status, sent.body["error"]["stage"]) == (502, "prefill")


async def test_nothing_is_held_afterwards(engines: Cluster) -> None:
    await engines.idle(seconds=40)
