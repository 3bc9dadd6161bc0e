from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engines.errors import BadRequest, EngineError, ShuttingDown
from engines.language.engine import LanguageEngine
from engines.language.scheduler import Limits
from engines.language.sequence import Handoff, SamplingParams, Sequence
from engines.language.stream import Stream
from engines.transfer.base import PeerFailed
from tests.support.fake_runner import FakeCache, FakeRunner, expected
from tests.support.waiting import until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@asynccontextmanager
async def running(num_blocks: int = 16, eos: tuple[int, ...] = ()) -> AsyncIterator[tuple[LanguageEngine, FakeRunner]]:
    cache = FakeCache(num_blocks, 4)
    runner = FakeRunner(cache)
    engine = LanguageEngine(Limits(num_blocks, 4, 64, 4, 8), runner, cache, eos)
    engine.start()
    try:
        async with asyncio.timeout(30):
            yield engine, runner
    finally:
        runner.gate.set()
        await engine.close()


def make(name: str = "s", prompt: list[int] = PROMPT, handoff: Handoff = Handoff.NONE, **params: Any) -> Sequence:
    return Sequence(name, list(prompt), len(prompt), SamplingParams(**{"max_tokens": 6, **params}), handoff=handoff)


async def collect(stream: Stream) -> dict[int, list[int]]:
    answer: dict[int, list[int]] = {}
    async for tokens in stream:
        for token in tokens:
            answer.setdefault(token.index, []).append(token.token_id)
    return answer


async def all_free(engine: LanguageEngine) -> None:
    await until(lambda: engine.stats.free_blocks == engine.limits.num_blocks)


async def test_tokens_stream_out_and_the_blocks_come_back() -> None:
    async with running() as (engine, _):
        assert await collect(engine.submit(make())) == {0: expected(PROMPT, 6)}
        await all_free(engine)


async def test_many_at_once_answer_as_one_by_one_in_a_cache_for_few() -> None:
    prompts = [[n, *PROMPT[: n % 7]] for n in range(20)]
    async with running(num_blocks=8) as (engine, _):
        streams = [engine.submit(make(f"s{n}", prompt, max_tokens=15)) for n, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*map(collect, streams))
        assert answers == [{0: expected(prompt, 15)} for prompt in prompts]
        await all_free(engine)
        assert engine.stats.preemptions > 0


async def test_choices_share_one_prefill() -> None:
    async with running() as (engine, _runner):
        assert await collect(engine.submit(make(n=3))) == {index: expected(PROMPT, 6) for index in range(3)}
        await all_free(engine)


async def test_one_choice_can_stop_before_the_others() -> None:
    async with running() as (engine, runner):
        runner.fails = lambda batch: runner.gate.clear() if runner.steps == 4 else None
        stream = engine.submit(make(n=2, max_tokens=20))
        await until(lambda: runner.steps == 4)
        stream.stop(0)
        runner.gate.set()
        answer = await collect(stream)
        assert answer[1] == expected(PROMPT, 20)
        assert len(answer[0]) in (3, 4)  # the step that waits at the gate may be one more
        await all_free(engine)


async def test_eos_ends_with_stop_and_the_limit_with_length() -> None:
    second = expected(PROMPT, 2)[1]
    async with running(eos=(second,)) as (engine, _):
        tokens = [token async for batch in engine.submit(make()) for token in batch]
        assert [token.finish_reason for token in tokens] == [None, "stop"]
        tokens = [token async for batch in engine.submit(make(ignore_eos=True)) for token in batch]
        assert [token.finish_reason for token in tokens][-1] == "length"


async def test_closing_a_stream_frees_its_blocks() -> None:
    async with running() as (engine, _runner):
        stream = engine.submit(make(max_tokens=40))
        await anext(stream)
        stream.close()
        await all_free(engine)
        assert await collect(engine.submit(make())) == {0: expected(PROMPT, 6)}


async def test_closing_in_the_middle_of_a_step() -> None:
    async with running() as (engine, runner):
        runner.gate.clear()
        freed = asyncio.Event()
        stream = engine.submit(make(), on_prefilled=freed.set)
        await until(lambda: engine.queued == 0)
        stream.close()
        await asyncio.sleep(0)
        assert not freed.is_set()  # the step may still read the embeddings
        runner.gate.set()
        await freed.wait()
        await all_free(engine)


async def test_what_is_computed_is_reported_from_the_first_step_on_until_the_prompt_is_over() -> None:
    async with running() as (engine, _):
        seq, computed = make(), list[int]()
        seq.on_computed, seq.held_at = computed.append, 0
        stream = engine.submit(seq)
        await until(lambda: computed)
        assert computed == [0], "it runs, and waits for the embedding of its first token"
        for held_at in (2, 3):
            engine.embedded(seq, None, held_at)
            await until(lambda held_at=held_at: computed[-1] == held_at)
        engine.embedded(seq, None, None)
        assert await collect(stream) == {0: expected(PROMPT, 6)}
        assert computed == sorted(set(computed))
        assert computed[-1] < len(PROMPT)
        await all_free(engine)


async def test_an_error_of_one_sequence_fails_its_request_alone() -> None:
    async with running() as (engine, runner):

        def fails(batch: Any) -> None:
            if any(entry.seq.id == "bad" for entry in batch):
                raise ValueError("bad embeddings")

        runner.fails = fails
        runner.gate.clear()
        good, bad, other = (engine.submit(make(name, PROMPT[:2])) for name in ("good", "bad", "other"))
        runner.gate.set()
        assert await collect(good) == {0: expected(PROMPT[:2], 6)}
        with pytest.raises(EngineError, match="bad embeddings"):
            await collect(bad)
        assert await collect(other) == {0: expected(PROMPT[:2], 6)}
        await all_free(engine)


async def test_one_choice_that_fails_takes_its_request_and_nobody_else() -> None:
    async with running(num_blocks=32) as (engine, runner):

        def fails(batch: Any) -> None:
            if any(entry.seq.id == "bad/2" for entry in batch):
                raise ValueError("unlucky")

        runner.fails = fails
        runner.gate.clear()
        bad, good = engine.submit(make("bad", PROMPT[:2], n=3)), engine.submit(make("good", PROMPT[:2]))
        runner.gate.set()
        with pytest.raises(EngineError, match="unlucky"):
            await collect(bad)
        assert await collect(good) == {0: expected(PROMPT[:2], 6)}
        await all_free(engine)


async def test_a_broken_model_fails_what_runs_and_the_engine_goes_on() -> None:
    async with running() as (engine, runner):

        def fails(_batch: Any) -> None:
            raise MemoryError("no memory")

        runner.fails = fails
        streams = [engine.submit(make(f"s{n}")) for n in range(3)]
        for stream in streams:
            with pytest.raises(EngineError, match="MemoryError") as raised:
                await collect(stream)
            assert raised.value.retryable
        runner.fails = lambda batch: None
        assert await collect(engine.submit(make())) == {0: expected(PROMPT, 6)}
        await all_free(engine)


async def test_a_step_that_breaks_outside_the_model_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(num_blocks=8) as (engine, runner):

        def no_room(_blocks: Any) -> None:
            raise MemoryError("no host memory")

        with monkeypatch.context() as patch:
            patch.setattr(runner.cache, "save", no_room)
            streams = [engine.submit(make(f"s{n}", max_tokens=20)) for n in range(3)]
            results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
            assert any(isinstance(result, EngineError) for result in results)
        await all_free(engine)
        assert await collect(engine.submit(make())) == {0: expected(PROMPT, 6)}


async def test_what_never_fits_is_told_so() -> None:
    async with running() as (engine, _):
        freed = asyncio.Event()
        stream = engine.submit(make(max_tokens=60), on_prefilled=freed.set)
        with pytest.raises(BadRequest, match="context length is 64"):
            await anext(stream)
        await freed.wait()
        stream.close()


async def test_a_received_sequence_waits_for_its_kv() -> None:
    async with running() as (engine, runner):
        seq = make(handoff=Handoff.RECEIVE)
        stream = engine.submit(seq)
        blocks = await stream.admitted()
        for position, token in enumerate(PROMPT):
            runner.cache.write(blocks, position, token)
        engine.unpin(seq)
        engine.arrived(seq)
        assert await collect(stream) == {0: expected(PROMPT, 6)}
        await all_free(engine)


async def test_the_sink_sees_every_chunk_and_layer_and_can_fail_its_request() -> None:
    async with running() as (engine, _runner):
        seen: list[tuple[int, int, int, int]] = []
        seq = make(max_tokens=1, handoff=Handoff.SEND)
        stream = engine.submit(
            seq, sink=lambda entry, first, last: seen.append((entry.start, entry.count, first, last))
        )
        assert await collect(stream) == {0: expected(PROMPT, 1)}
        assert seen == [(0, 8, 0, 1), (0, 8, 1, 2), (8, 1, 0, 1), (8, 1, 1, 2)]
        await until(lambda: engine.stats.running == 0)
        assert engine.stats.free_blocks == 13
        engine.unpin(seq)
        await all_free(engine)

        def broken(*_: Any) -> None:
            raise PeerFailed("gone")

        stream = engine.submit(make(max_tokens=1), sink=broken)
        with pytest.raises(PeerFailed):
            await collect(stream)
        await all_free(engine)


async def test_closing_the_engine_fails_what_is_open() -> None:
    async with running() as (engine, _runner):
        stream = engine.submit(make(handoff=Handoff.RECEIVE))
        await stream.admitted()
        await engine.close()
        with pytest.raises(ShuttingDown):
            await collect(stream)
        with pytest.raises(ShuttingDown):
            engine.submit(make())


async def test_books_are_compared_between_two_steps() -> None:
    async with running() as (engine, runner):
        runner.gate.clear()
        stream = engine.submit(make(max_tokens=20))
        checked = asyncio.ensure_future(engine.check())
        runner.gate.set()
        await checked
        stream.close()
        await all_free(engine)
        (lost,) = engine._scheduler.blocks.allocate(1)
        with pytest.raises(RuntimeError, match="block references"):
            await engine.check()
        engine._scheduler.blocks.release([lost])
        await engine.check()
    with pytest.raises(ShuttingDown):
        await engine.check()
