from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Listing
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client import CollectorRegistry

from engines.errors import BadRequest, DeadlineExceeded, Overloaded, PeerFailed
from engines.language.descriptors import Ask, Keep, Plan
from engines.language.embedding_rows import Rows
from engines.language.embeddings import EmbeddingReceiver, Room
from engines.language.engine import LanguageEngine
from engines.language.handoff import Handoffs, Waits
from engines.language.metaserver import Metaserver
from engines.language.metrics import Metrics
from engines.language.parallel.carrier import Carrier
from engines.language.prompt import Prompt
from engines.language.requests import Generation
from engines.language.scheduler import Limits
from engines.language.sequence import Item, SamplingParams, Scheduled
from engines.language.service import Rules, Service
from engines.transfer import create
from engines.transfer.base import Arena, Transfer
from tests.support.fake_runner import FakeCache, FakeRunner, expected, layout
from tests.support.waiting import until

IMAGE = Item("ab", "image", (1, 2, 4), 1, 2)


@asynccontextmanager
async def world(
    max_queue: int = 10, timeout: float = 10.0, room: Room | None = None, blocks: int = 16
) -> AsyncIterator[tuple[Service, LanguageEngine, FakeRunner]]:
    shape = layout(8, 4)
    transfer = create("memory", timeout=2.0)
    transfer.facts = shape.facts()
    kv = transfer.allocate("kv", shape.nbytes)
    embeddings = transfer.allocate("embeddings", blocks * 16 * (room or Room()).block_tokens)
    await transfer.start()
    cache = FakeCache(8, 4, kv.buffer)
    runner = FakeRunner(cache)
    engine = LanguageEngine(Limits(8, 4, 32, 1, 8), runner, cache)
    engine.start()
    async with aiohttp.ClientSession() as session:
        metrics = Metrics(CollectorRegistry(), lambda: engine.stats)
        waits, metaserver = Waits(5.0, 5.0), Metaserver(session, 5.0)
        handoffs = Handoffs(engine, Carrier(transfer), (kv, cache), waits, metrics, metaserver)
        receiver = EmbeddingReceiver(transfer, embeddings, 4, 5.0, room=room)
        try:
            async with asyncio.timeout(30):
                yield Service(engine, handoffs, receiver, metrics, Rules(2, True, max_queue, timeout)), engine, runner
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


class Promises:
    """An encoder that has announced embeddings."""

    def __init__(self, transfer: Transfer, arena: Arena) -> None:
        self.transfer, self._arena = transfer, arena

    async def entry(self, item: Item) -> dict[str, Any]:
        shape = [item.num_tokens, 4]
        spans = [(0, 16 * item.num_tokens)]
        where = await self.transfer.publish(
            *(item.mm_hash, self._arena, spans), ttl=None, on_free=lambda: None, promised=True
        )
        return {"num_tokens": item.num_tokens, "dtype": "float32", "shape": shape, "where": where}

    def fill(self, numbers: npt.NDArray[Any]) -> None:
        """What every embedding begins with."""
        data = numbers.astype(np.float32).tobytes()
        self._arena.buffer[: len(data)] = data


@asynccontextmanager
async def promises() -> AsyncIterator[Promises]:
    transfer = create("memory", timeout=2.0)
    arena = transfer.allocate("embeddings", 4096)
    await transfer.start()
    try:
        yield Promises(transfer, arena)
    finally:
        await transfer.close()


SECOND = Item("cd", "image", (1, 2, 4), 4, 2)
PROMPT = [1, 9, 9, 4, 9, 9, 7]


async def test_the_text_before_an_image_is_prefilled_while_that_is_still_encoded() -> None:
    async with world() as (service, engine, runner), promises() as encoder:
        seen: list[tuple[int, int, list[bool]]] = []

        def look(batch: Listing[Scheduled]) -> None:
            for entry in batch:
                here = [held is not None for held in cast("list[object]", entry.seq.embeddings or [])]
                seen.append((entry.start, entry.count, here))

        runner.fails = look
        entries = {item.mm_hash: await encoder.entry(item) for item in (IMAGE, SECOND)}
        what = replace(generation(PROMPT, (IMAGE, SECOND)), embeddings=entries)
        answering = asyncio.create_task(answer(service, Keep(), what))
        await until(lambda: seen)
        assert seen == [(0, 1, [False, False])]
        encoder.transfer.fulfil(IMAGE.mm_hash)
        await until(lambda: len(seen) == 2)
        assert seen[1] == (1, 3, [True, False])
        encoder.transfer.fulfil(SECOND.mm_hash)
        assert await answering == expected(PROMPT, 4)
        assert seen[2] == (4, 3, [True, True])
        await until(lambda: engine.stats.free_blocks == 8)


async def test_an_embedding_that_is_lost_in_the_middle_of_a_prompt_ends_the_request() -> None:
    async with world() as (service, engine, runner), promises() as encoder:
        what = replace(generation(items=(IMAGE,)), embeddings={IMAGE.mm_hash: await encoder.entry(IMAGE)})
        answering = asyncio.create_task(answer(service, Keep(), what))
        await until(lambda: runner.steps == 1)
        encoder.transfer.withdraw(IMAGE.mm_hash)
        with pytest.raises(PeerFailed, match="promised") as lost:
            await answering
        assert (lost.value.stage, lost.value.code) == ("encode", "embedding_gone")
        await until(lambda: engine.stats.free_blocks == 8)
        assert await answer(service, Keep(), generation()) == expected([1, 2, 3, 4, 5], 4)


async def test_who_leaves_while_an_image_is_encoded_leaves_nothing_behind() -> None:
    async with world() as (service, engine, runner), promises() as encoder:
        what = replace(generation(items=(IMAGE,)), embeddings={IMAGE.mm_hash: await encoder.entry(IMAGE)})
        for ends in ("cancelled", "left"):
            steps = runner.steps
            if ends == "cancelled":
                answering = asyncio.create_task(answer(service, Keep(), what))
                await until(lambda steps=steps: runner.steps == steps + 1)
                answering.cancel()
                await asyncio.wait([answering])
            else:
                async with service.run(what, Keep(), "r"):
                    await until(lambda steps=steps: runner.steps == steps + 1)
            await until(lambda: engine.stats.free_blocks == 8 and not encoder.transfer.audit()["pushes"])


@pytest.mark.parametrize("default_tokens", [0, 2, 6], ids=["whole", "one block", "three blocks"])
async def test_requests_larger_than_the_pool_share_it_and_the_one_slot_of_the_model(default_tokens: int) -> None:
    items = (Item("ef", "image", (1, 2, 32), 2, 16), Item("ab", "image", (1, 2, 10), 19, 5))
    tokens = [1, 2, *[9] * 16, 3, *[9] * 5, 4, 5]
    room = Room(block_tokens=2, default_tokens=default_tokens)
    async with world(room=room, blocks=4) as (service, engine, runner), promises() as encoder:
        entries = {item.mm_hash: await encoder.entry(item) for item in items}
        encoder.fill(np.arange(16 * 4))
        wrong: list[object] = []

        def look(batch: Listing[Scheduled]) -> None:
            for entry in batch:
                for number, item in enumerate(items):
                    first = max(0, entry.start - item.offset)
                    end = min(entry.start + entry.count - item.offset, item.num_tokens)
                    if first < end:
                        found = cast("list[Rows]", entry.seq.embeddings)[number][first:end].flatten().tolist()
                        if found != list(range(4 * first, 4 * end)):
                            wrong.append((entry.start, found))

        runner.fails = look
        what = replace(generation(tokens, items), embeddings=entries)
        asking = [asyncio.create_task(answer(service, Keep(), what)) for _ in range(4)]
        for item in reversed(items):
            await asyncio.sleep(0.02)
            encoder.transfer.fulfil(item.mm_hash)
        assert await asyncio.gather(*asking) == [expected(tokens, 4)] * 4
        assert wrong == []
        pool = service._receiver.pool
        await until(lambda: engine.stats.free_blocks == 8 and pool.free == pool.capacity)


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
