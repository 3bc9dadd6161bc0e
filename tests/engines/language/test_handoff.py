"""Two engines in one loop, with the in-memory transport and a model whose KV is its tokens: a block that was not sent,
sent to the wrong place, or reused too early gives a wrong answer.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Listing
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from engines.errors import BadRequest, DeadlineExceeded, EngineError
from engines.language import mirror
from engines.language.descriptors import Ask, Fetch, Keep, Plan, Publish, Push, read
from engines.language.engine import LanguageEngine
from engines.language.handoff import Handoffs, Job, Waits
from engines.language.metaserver import Metaserver
from engines.language.metrics import Metrics
from engines.language.parallel.carrier import Carrier
from engines.language.scheduler import Limits
from engines.language.sequence import SamplingParams, Scheduled, Sequence
from engines.transfer import create
from engines.transfer.base import Transfer
from tests.support.fake_runner import FakeCache, FakeRunner, expected, layout
from tests.support.lanes import Late
from tests.support.metaserver import metaserver
from tests.support.waiting import until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
WAITS = Waits(handoff_timeout=5.0, kv_lease=5.0)


@dataclass
class Side:
    """One engine with its transfer."""

    name: str
    transfer: Transfer
    engine: LanguageEngine
    runner: FakeRunner
    handoffs: Handoffs
    prefilled: list[str]

    def job(self, prompt: list[int] = PROMPT, max_tokens: int = 6, n: int = 1) -> Job:
        name = f"{self.name}-{next(NUMBERS)}"
        seq = Sequence(name, list(prompt), len(prompt), SamplingParams(max_tokens=max_tokens, n=n))
        return Job(seq, f"chatcmpl-{name}", lambda: self.prefilled.append(name))

    async def answer(self, plan: Plan, job: Job) -> tuple[dict[int, list[int]], dict[str, Any] | None]:
        tokens: dict[int, list[int]] = {}
        async with self.handoffs.leg(plan, job) as leg:
            async for batch in leg.stream:
                for token in batch:
                    tokens.setdefault(token.index, []).append(token.token_id)
            return tokens, await leg.finish()

    async def at_rest(self) -> None:
        stats = self.engine.limits.num_blocks
        await until(lambda: self.engine.stats.free_blocks == stats and not any(self.transfer.audit().values()))


NUMBERS = itertools.count()


@pytest.fixture(params=[False, True], ids=["in place", "apart"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the KV cache lies elsewhere than where transfers read and write; it is copied there as late as can be."""
    monkeypatch.setattr(mirror, "lane_of", Late)
    return bool(request.param)


@asynccontextmanager
async def side(
    name: str, num_blocks: int, waits: Waits = WAITS, block_size: int = 4, apart: bool = False
) -> AsyncIterator[Side]:
    shape = layout(num_blocks, block_size)
    transfer = create("memory", timeout=2.0)
    transfer.facts = shape.facts()
    arena = transfer.allocate("kv", shape.nbytes)
    await transfer.start()
    cache = FakeCache(num_blocks, block_size, arena.buffer, apart)
    runner = FakeRunner(cache)
    engine = LanguageEngine(Limits(num_blocks, block_size, 64, 4, 8), runner, cache)
    engine.start()
    async with aiohttp.ClientSession() as session:
        metrics = Metrics(CollectorRegistry(), lambda: engine.stats)
        handoffs = Handoffs(engine, Carrier(transfer), (arena, cache), waits, metrics, Metaserver(session, timeout=5.0))
        try:
            async with asyncio.timeout(30):
                yield Side(name, transfer, engine, runner, handoffs, [])
        finally:
            runner.gate.set()
            await handoffs.close()
            await engine.close()
            await transfer.close()


@asynccontextmanager
async def pair(
    waits: Waits = WAITS, decode_block_size: int = 4, apart: bool = False
) -> AsyncIterator[tuple[Side, Side]]:
    """Prefill and decode, with caches of different sizes: block numbers and offsets never agree by luck."""
    async with (
        side("p", 12, waits, apart=apart) as prefill,
        side("d", 17, waits, decode_block_size, apart) as decode,
    ):
        # Push the decode engine's blocks away from those of the same number at prefill.
        keeper = decode.engine.submit(decode.job([1, 2, 3]).seq)
        async for _ in keeper:
            pass
        yield prefill, decode


def prefill_for(prefill: Side, prompt: list[int] = PROMPT) -> Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]:
    async def handle(descriptor: dict[str, Any]) -> tuple[int, Any]:
        plan = read(descriptor, "prefill")
        assert isinstance(plan, Push)
        try:
            await prefill.answer(plan, prefill.job(prompt, max_tokens=1))
        except EngineError as error:
            return error.status, error.body("prefill")
        return 200, {"status": "ok"}

    return handle


async def publish(prefill: Side) -> Fetch:
    _, params = await prefill.answer(Publish(), prefill.job(max_tokens=1))
    plan = read(params, "decode")
    assert isinstance(plan, Fetch)
    return plan


async def test_plain_runs_here() -> None:
    async with side("both", 12) as both:
        assert await both.answer(Keep(), both.job()) == ({0: expected(PROMPT, 6)}, None)
        assert len(both.prefilled) == 1
        await both.at_rest()


@pytest.mark.parametrize("n", [1, 3])
async def test_push(n: int, apart: bool) -> None:
    async with pair(apart=apart) as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        tokens, params = await decode.answer(Ask(url), decode.job(n=n))
        assert tokens == {index: expected(PROMPT, 6) for index in range(n)}
        assert params is None
        await prefill.at_rest()
        await decode.at_rest()
        assert (len(prefill.prefilled), len(decode.prefilled)) == (1, 1)


async def test_decode_answers_while_prefill_is_still_at_its_own_token(apart: bool) -> None:
    answered = threading.Event()
    async with pair(apart=apart) as (prefill, decode), metaserver(prefill_for(prefill)) as url:

        def head(batch: Listing[Scheduled]) -> None:
            assert not batch[0].sample or answered.wait(20)

        prefill.runner.head = head
        assert await decode.answer(Ask(url), decode.job()) == ({0: expected(PROMPT, 6)}, None)
        assert prefill.engine.stats.running == 1
        answered.set()
        await prefill.at_rest()
        await decode.at_rest()


async def test_a_step_that_is_run_again_sends_nothing_twice() -> None:
    short, failures = PROMPT[:5], list[int]()
    async with pair() as (prefill, decode), metaserver(prefill_for(prefill, short)) as url:

        def head(batch: Listing[Scheduled]) -> None:
            if len(batch) > 1 and batch[0].sample:
                failures.append(len(batch))
                raise RuntimeError("the head is too large")

        prefill.runner.head = head
        prefill.runner.gate.clear()
        asks = [asyncio.create_task(decode.answer(Ask(url), decode.job(short))) for _ in range(3)]
        await until(lambda: prefill.transfer.audit()["pushes"] == 3)
        await asyncio.sleep(0.3)  # the first is in a step of its own, the others in the next
        prefill.runner.gate.set()
        assert await asyncio.gather(*asks) == [({0: expected(short, 6)}, None)] * 3
        await prefill.at_rest()
        await decode.at_rest()
        assert failures


@pytest.mark.parametrize("n", [1, 3])
async def test_pull(n: int, apart: bool) -> None:
    async with pair(apart=apart) as (prefill, decode):
        tokens, _ = await decode.answer(await publish(prefill), decode.job(n=n))
        assert tokens == {index: expected(PROMPT, 6) for index in range(n)}
        await prefill.at_rest()
        await decode.at_rest()


@pytest.mark.parametrize("pull", [False, True], ids=["push", "pull"])
async def test_blocks_that_were_kept_of_another_prompt_are_sent_too(pull: bool, apart: bool) -> None:
    """Blocks out of the prefix cache that no transfer has seen before."""
    async with pair(apart=apart) as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        await prefill.answer(Keep(), prefill.job(max_tokens=1))
        ran = prefill.runner.steps
        tokens, _ = await decode.answer(await publish(prefill) if pull else Ask(url), decode.job())
        assert tokens == {0: expected(PROMPT, 6)}
        assert prefill.runner.steps == ran + 1, "it was there already, but for its last token"
        await prefill.at_rest()
        await decode.at_rest()


async def test_many_pushes_at_once(apart: bool) -> None:
    async with pair(apart=apart) as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        answers = await asyncio.gather(*(decode.answer(Ask(url), decode.job()) for _ in range(12)))
        assert answers == [({0: expected(PROMPT, 6)}, None)] * 12
        await prefill.at_rest()
        await decode.at_rest()


async def test_many_pulls_at_once(apart: bool) -> None:
    async with pair(apart=apart) as (prefill, decode):

        async def pulled() -> Any:
            return await decode.answer(await publish(prefill), decode.job())

        answers = await asyncio.gather(*(pulled() for _ in range(12)))
        assert answers == [({0: expected(PROMPT, 6)}, None)] * 12
        await prefill.at_rest()
        await decode.at_rest()


async def test_a_published_prompt_is_free_when_its_lease_ends() -> None:
    async with pair(Waits(5.0, kv_lease=0.2)) as (prefill, decode):
        plan = await publish(prefill)
        assert prefill.engine.stats.free_blocks < 12
        await prefill.at_rest()
        with pytest.raises(EngineError) as raised:
            await decode.answer(plan, decode.job())
        assert (raised.value.stage, raised.value.code, raised.value.retryable) == ("prefill", "kv_gone", True)
        await decode.at_rest()


async def test_the_metaserver_refuses() -> None:
    async def refuse(_: dict[str, Any]) -> tuple[int, Any]:
        return 404, {"error": {"message": "nobody waits for that id", "stage": "proxy", "code": "unknown_request"}}

    async with pair() as (_, decode), metaserver(refuse) as url:
        with pytest.raises(EngineError) as raised:
            await decode.answer(Ask(url), decode.job())
        assert (raised.value.status, raised.value.stage, raised.value.code) == (404, "proxy", "unknown_request")
        await decode.at_rest()


async def test_the_kv_never_comes() -> None:
    async def lies(_: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"status": "ok"}

    async with pair(Waits(0.2, 5.0)) as (_, decode), metaserver(lies) as url:
        with pytest.raises(DeadlineExceeded) as raised:
            await decode.answer(Ask(url), decode.job())
        assert (raised.value.stage, raised.value.code) == ("prefill", "kv_timeout")
        await decode.at_rest()


async def test_a_prefill_that_fails_fails_decode_with_its_error() -> None:
    async with pair() as (prefill, decode), metaserver(prefill_for(prefill)) as url:

        def fails(_: Any) -> None:
            raise ValueError("no such weights")

        prefill.runner.fails = fails
        with pytest.raises(EngineError, match="no such weights") as raised:
            await decode.answer(Ask(url), decode.job())
        assert raised.value.stage == "prefill"
        await prefill.at_rest()
        await decode.at_rest()


async def test_engines_of_other_shapes_refuse_each_other() -> None:
    async with (
        pair(Waits(5.0, kv_lease=0.3), decode_block_size=2) as (prefill, decode),
        metaserver(prefill_for(prefill)) as url,
    ):
        with pytest.raises(EngineError, match="block_size is 2 there and 4 here"):
            await decode.answer(Ask(url), decode.job())
        with pytest.raises(EngineError, match="block_size is 4 there and 2 here") as raised:
            await decode.answer(await publish(prefill), decode.job())
        assert raised.value.code == "layout_mismatch"
        await decode.at_rest()
        assert prefill.engine.stats.free_blocks == 6  # nobody has read it
        await prefill.at_rest()


async def test_another_prompt_is_refused() -> None:
    async with pair(Waits(5.0, kv_lease=0.3)) as (prefill, decode), metaserver(prefill_for(prefill, PROMPT * 2)) as url:
        with pytest.raises(BadRequest, match="6 remote blocks of 4 tokens"):
            await decode.answer(Ask(url), decode.job())
        with pytest.raises(BadRequest, match="21 tokens, decode has 42"):
            await decode.answer(await publish(prefill), decode.job(PROMPT * 2))
        await decode.at_rest()
        await prefill.at_rest()


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_decode_is_cancelled_before_it_has_blocks() -> None:
    async with pair() as (_, decode):
        decode.runner.gate.clear()
        busy = decode.engine.submit(decode.job([1, 2, 3]).seq)
        await until(lambda: decode.engine.queued == 0)
        task = asyncio.create_task(decode.answer(Ask("http://127.0.0.1:1/"), decode.job()))
        await asyncio.sleep(0)
        await cancel(task)
        decode.runner.gate.set()
        busy.close()
        await decode.at_rest()


async def test_decode_is_cancelled_while_prefill_runs() -> None:
    async with pair() as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        prefill.runner.gate.clear()
        task = asyncio.create_task(decode.answer(Ask(url), decode.job()))
        await until(lambda: prefill.transfer.audit()["pushes"] == 1)
        await cancel(task)
        prefill.runner.gate.set()
        await prefill.at_rest()
        await decode.at_rest()


async def test_decode_is_cancelled_while_it_decodes() -> None:
    async with pair() as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        steps = decode.runner.steps
        decode.runner.fails = lambda _: decode.runner.gate.clear() if decode.runner.steps == steps + 3 else None
        task = asyncio.create_task(decode.answer(Ask(url), decode.job(max_tokens=20)))
        await until(lambda: decode.runner.steps == steps + 3)
        await cancel(task)
        decode.runner.gate.set()
        await prefill.at_rest()
        await decode.at_rest()


async def test_prefill_is_cancelled_in_a_step(apart: bool) -> None:
    """The step goes on writing into a push that has ended; decode hears of it at once, and not after a deadline."""
    async with pair(apart=apart) as (prefill, decode):
        legs: list[asyncio.Task[Any]] = []

        async def handle(descriptor: dict[str, Any]) -> tuple[int, Any]:
            plan = read(descriptor, "prefill")
            legs.append(asyncio.create_task(prefill.answer(plan, prefill.job(max_tokens=1))))
            await asyncio.gather(*legs, return_exceptions=True)
            return 502, None

        async with metaserver(handle) as url:
            prefill.runner.gate.clear()
            task = asyncio.create_task(decode.answer(Ask(url), decode.job()))
            await until(lambda: prefill.transfer.audit()["pushes"] == 1)
            await cancel(legs[0])
            prefill.runner.gate.set()
            with pytest.raises(EngineError) as raised:
                await task
            assert raised.value.stage == "prefill"
            await prefill.at_rest()
            await decode.at_rest()


async def test_blocks_that_a_write_may_touch_are_not_reused() -> None:
    """Decode gives up in the middle of a write: its blocks are free for others when that write is over, not before."""
    async with pair() as (prefill, decode), metaserver(prefill_for(prefill)) as url:
        writing, go_on = threading.Event(), threading.Event()

        def slow(_moves: Any) -> None:
            writing.set()
            assert go_on.wait(20)

        prefill.transfer.plane.script = slow  # type: ignore[attr-defined]
        task = asyncio.create_task(decode.answer(Ask(url), decode.job()))
        await until(writing.is_set)
        await cancel(task)
        await until(lambda: decode.engine.stats.remote == 0)
        assert decode.engine.stats.free_blocks == 17 - 6
        assert decode.transfer.audit()["quarantined_bytes"]
        go_on.set()
        await decode.at_rest()
        await prefill.at_rest()
        prefill.transfer.plane.script = None  # type: ignore[attr-defined]
        assert await decode.answer(Ask(url), decode.job()) == ({0: expected(PROMPT, 6)}, None)


async def test_a_plan_that_fails_before_the_engine_knows_lets_go_of_the_embeddings() -> None:
    async with pair() as (prefill, _):
        with pytest.raises(EngineError):
            await prefill.answer(Push({"nonsense": 1}, (1,)), prefill.job(max_tokens=1))
        assert len(prefill.prefilled) == 1
        await prefill.at_rest()
