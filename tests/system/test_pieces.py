"""Embeddings in tiny pieces: exact answers from a pool that holds less than one image, and no block lost with them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from engines.language.model import ModelFacts
from tests.support.checkpoints import checkpoint
from tests.support.cluster import LANGUAGE, Cluster, cluster
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually
from tests.system.cases import CASES, MAX_TOKENS
from tests.system.videos import VIDEOS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen3_vl"
TOKENS = 8
"""Room in the pool: less than any image of the cases takes."""
LARGE = [image_part(image_file(800, 640, seed=7)), {"type": "text", "text": "What is this?"}]
PROXY = ("--encode-timeout", "4", "--prefill-timeout", "10", "--first-token-timeout", "12")


def pool(default: int) -> tuple[str, ...]:
    """Blocks of one token each."""
    nbytes = TOKENS * 4 * ModelFacts.read(checkpoint(FAMILY)).embedding_width
    blocks = ("--embedding-bytes", str(nbytes), "--embedding-block-tokens", "1")
    return (*LANGUAGE, *blocks, "--embedding-default-tokens", str(default))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Cluster]:
    options: dict[str, Any] = {
        "proxy_arguments": PROXY,
        "engine_arguments": ("--transfer-timeout", "3", "--grace", "2"),
        "role_arguments": {"prefill": pool(default=1)},
        "restarts": 100,
    }
    async with cluster(FAMILY, "1e1p1d", **options) as running:
        running.deployment.keep_alive()
        yield running


async def answers_exactly(cluster: Cluster) -> None:
    answers = await asyncio.gather(*(cluster.chat(case.content, max_tokens=MAX_TOKENS) for case in CASES))
    for case, answer in zip(CASES, answers, strict=True):
        assert answer.status == 200, answer.error
        assert answer.text == case.expected(FAMILY), case.name
    await cluster.idle()


async def test_every_answer_is_exact_token_by_token(deployment: Cluster) -> None:
    await answers_exactly(deployment)


async def test_videos_arrive_in_pieces_too(deployment: Cluster) -> None:
    """Whose rows stand in several places of the prompt, one after the other."""
    for case in VIDEOS:
        answer = await deployment.chat(case.content, max_tokens=MAX_TOKENS)
        assert (answer.status, answer.text) == (200, case.expected(FAMILY)), case.name
    await deployment.idle()


@pytest.mark.parametrize(("transport", "default"), [("zmq", 0), ("mooncake", 1)])
async def test_every_transport_brings_pieces(transport: str, default: int) -> None:
    if transport == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake or its system libraries are not installed")
    async with cluster(FAMILY, "1e1pd", transfer=transport, role_arguments={"both": pool(default)}) as deployment:
        await answers_exactly(deployment)


@pytest.mark.parametrize("strike", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_an_encoder_that_is_struck_between_two_pieces_leaves_no_block_behind(
    deployment: Cluster, strike: signal.Signals
) -> None:
    asking = asyncio.create_task(deployment.chat(LARGE, max_tokens=4, timeout=30))
    await eventually(lambda: bringing(deployment), 15)
    assert not asking.done()
    encoder = deployment.engine("encode")
    encoder.signal(strike)
    try:
        answer = await asking
    finally:
        encoder.signal(signal.SIGCONT)
    # a proxy that has time for it has the item encoded again, and an answer after all
    assert answer.status == 200 or (answer.error and answer.error["stage"] in {"encode", "prefill"}), answer
    await deployment.idle(60)
    await eventually(lambda: all_ready(deployment), 30)


async def test_a_reader_that_is_slow_between_two_pieces_gets_them_all(deployment: Cluster) -> None:
    whole = await deployment.chat(LARGE, max_tokens=4, timeout=30)
    asking = asyncio.create_task(deployment.chat(LARGE, max_tokens=4, timeout=30))
    await eventually(lambda: bringing(deployment), 15)
    reader = deployment.engine("prefill")
    reader.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(0.5)
        assert not asking.done()
    finally:
        reader.signal(signal.SIGCONT)
    answer = await asking
    assert answer.status == whole.status == 200, (answer.error, whole.error)
    assert answer.text == whole.text
    await deployment.idle()


async def test_a_client_that_leaves_between_two_pieces_takes_them_along(deployment: Cluster) -> None:
    asking = asyncio.create_task(deployment.chat(LARGE, max_tokens=4, timeout=30))
    await eventually(lambda: bringing(deployment), 15)
    asking.cancel()
    await asyncio.wait([asking])
    await deployment.idle(10)
    await answers_exactly(deployment)


async def bringing(cluster: Cluster) -> bool:
    info = await cluster.info("prefill")
    return bool(info["running"]) and info["embeddings"]["free"] < info["embeddings"]["capacity"]


async def all_ready(cluster: Cluster) -> bool:
    return all(instance["state"] == "READY" for instance in (await cluster.get("/instances"))["instances"])
