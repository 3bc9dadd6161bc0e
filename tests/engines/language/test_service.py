from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from engines.errors import BadRequest, DeadlineExceeded, Overloaded
from engines.language.descriptors import Ask, Keep, Plan
from engines.language.embeddings import EmbeddingReceiver
from engines.language.engine import LanguageEngine
from engines.language.handoff import Handoffs, Waits
from engines.language.metaserver import Metaserver
from engines.language.metrics import Metrics
from engines.language.prompt import Prompt
from engines.language.requests import Generation
from engines.language.scheduler import Limits
from engines.language.sequence import Item, SamplingParams
from engines.language.service import Rules, Service
from engines.transfer import create
from tests.support.fake_runner import FakeCache, FakeRunner, expected, layout
from tests.support.waiting import until

IMAGE = Item("ab", "image", (1, 2, 4), 1, 2)


@asynccontextmanager
async def world(
    max_queue: int = 10, timeout: float = 10.0
) -> AsyncIterator[tuple[Service, LanguageEngine, FakeRunner]]:
    shape = layout(8, 4)
    transfer = create("memory", timeout=2.0)
    transfer.facts = shape.facts()
    kv, embeddings = transfer.allocate("kv", shape.nbytes), transfer.allocate("embeddings", 4096)
    await transfer.start()
    cache = FakeCache(8, 4, kv.buffer)
    runner = FakeRunner(cache)
    engine = LanguageEngine(Limits(8, 4, 32, 1, 8), runner, cache)
    engine.start()
    async with aiohttp.ClientSession() as session:
        metrics = Metrics(CollectorRegistry(), lambda: engine.stats)
        waits, metaserver = Waits(5.0, 5.0), Metaserver(session, 5.0)
        handoffs = Handoffs(engine, transfer, (kv, shape), waits, metrics, metaserver)
        receiver = EmbeddingReceiver(transfer, embeddings, 4, 5.0)
        try:
            async with asyncio.timeout(30):
                yield Service(engine, handoffs, receiver, metrics, Rules(2, max_queue, timeout)), engine, runner
        finally:
            runner.gate.set()
            await handoffs.close()
            await engine.close()
            await transfer.close()


def generation(tokens: list[int] | None = None, items: tuple[Item, ...] = (), n: int = 1, **fields: Any) -> Generation:
    prompt = Prompt(tokens or [1, 2, 3, 4, 5], items)
    return Generation(True, prompt, SamplingParams(max_tokens=4, n=n), False, False, {}, None, **fields)


async def answer(service: Service, plan: Plan, what: Generation) -> list[int]:
    async with service.run(what, plan, "r") as leg:
        return [token.token_id async for tokens in leg.stream for token in tokens]


async def test_the_same_id_may_run_twice_at_once() -> None:
    async with world() as (service, engine, _):
        answers = await asyncio.gather(*(answer(service, Keep(), generation()) for _ in range(4)))
        assert answers == [expected([1, 2, 3, 4, 5], 4)] * 4
        await until(lambda: engine.stats.free_blocks == 8)


async def test_a_full_queue_refuses() -> None:
    async with world(max_queue=2) as (service, engine, runner):
        runner.gate.clear()
        tasks = [asyncio.create_task(answer(service, Keep(), generation()))]
        await until(lambda: engine.stats.running == 1)
        tasks += [asyncio.create_task(answer(service, Keep(), generation())) for _ in range(2)]
        await until(lambda: engine.queued == 2)
        with pytest.raises(Overloaded, match="--max-queue"):
            await answer(service, Keep(), generation())
        runner.gate.set()
        await asyncio.gather(*tasks)


async def test_the_request_timeout_frees_everything() -> None:
    async with world(timeout=0.1) as (service, engine, runner):
        runner.gate.clear()
        with pytest.raises(DeadlineExceeded, match="--request-timeout"):
            await answer(service, Keep(), generation())
        runner.gate.set()
        await until(lambda: engine.stats.free_blocks == 8)


async def test_a_timeout_of_the_handlers_own_is_not_taken_for_ours() -> None:
    async with world() as (service, _, _runner):
        with pytest.raises(TimeoutError):
            async with service.run(generation(), Keep(), "r"):
                raise TimeoutError("somebody else's")


async def test_items_without_embeddings_are_refused_before_anything_runs() -> None:
    async with world() as (service, engine, runner):
        with pytest.raises(BadRequest, match="no encoder"):
            await answer(service, Keep(), generation(items=(IMAGE,)))
        assert runner.steps == 0
        assert engine.stats.free_blocks == 8


async def test_decode_needs_a_last_token_that_is_text() -> None:
    async with world() as (service, _, _runner):
        with pytest.raises(BadRequest, match="ends in an image"):
            await answer(service, Ask("http://127.0.0.1:1/"), generation([1, 9, 9], (IMAGE,)))
        with pytest.raises(BadRequest, match="ends in an image"):
            await answer(service, Keep(), generation([1, 9, 9], (IMAGE,), n=2))


async def test_a_grid_that_makes_other_tokens_is_refused() -> None:
    odd = Item("ab", "image", (1, 2, 8), 1, 2)
    async with world() as (service, _, _runner):
        with pytest.raises(BadRequest, match="grid"):
            await answer(service, Keep(), generation(items=(odd,)))
