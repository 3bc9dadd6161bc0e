"""Decode steps over inputs that stay in place: with a capture that does the work again, the tokens are those of a step
without graphs, whatever was in the inputs before.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.language import graphs as module
from engines.language.attention import Query
from engines.language.engine import LanguageEngine
from engines.language.graphs import EVERY, LONGER, Captures, DecodeGraphs, Work, buckets, widths
from engines.language.kv import KVCache
from engines.language.runner import Runner
from engines.language.scheduler import Limits
from engines.language.sequence import SamplingParams, Scheduled, Sequence
from engines.language.varlen import Kernel, Varlen, copied
from tests.support.checkpoints import FAMILIES
from tests.support.cuda import Cuda
from tests.support.drive import CASES, Case, Driver, case, language_model, new_cache
from tests.support.kernels import varlen_attn


class Replays:
    """Stands for the capture: the work is done anew each time, and its result lies where the last one lay."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.captured: list[int] = []

    def __call__(self, work: Work) -> Work:
        result = work().clone()
        self.captured.append(len(result))

        def replay() -> torch.Tensor:
            self.rows.append(len(result))
            return result.copy_(work())

        return replay


def with_graphs(family: str, most: int, max_tokens: int = 1024, kernel: Kernel = varlen_attn) -> tuple[Driver, Replays]:
    model, replays = language_model(family), Replays()
    cache = new_cache(model)
    graphs = DecodeGraphs(model, cache, Varlen(cache, kernel), most, max_tokens, replays)
    runner = Runner(model, cache, backend=Varlen(cache, varlen_attn), graphs=graphs)
    return Driver(runner, budget=40, chunk=24), replays


@pytest.mark.parametrize(
    ("family", "kernel"),
    [*((family, varlen_attn) for family in FAMILIES), pytest.param("qwen3_vl", copied, id="copied")],
)
def test_greedy_tokens_equal_generate(family: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 64)
    loop, replays = with_graphs(family, most=4, kernel=kernel)
    cases = [case(family, name) for name in CASES]
    assert loop.finish(*(loop.of(one) for one in cases)) == [one.expected for one in cases]
    assert {1, 2, 4} & set(replays.rows)
    assert replays.captured == [4, 4, 4, 2, 2, 2, 1, 1, 1]
    shared = loop.runner.cache.pool[:, loop.runner.cache.scratch_block]
    assert shared[:, :, 0].any(), "nothing was padded"
    assert not shared[:, :, 1:].any(), "padding is one token"


def test_a_batch_takes_the_smallest_graph_that_holds_it() -> None:
    loop, replays = with_graphs("qwen3_vl", most=4)
    cases = [case("qwen3_vl", name) for name in ("text", "one", "two")]
    sequences = [loop.of(one) for one in cases]
    loop.budget = loop.chunk = 1 << 30
    loop.step(sequences)
    assert replays.rows == []
    for batch, rows in ((3, 4), (1, 1), (2, 2), (3, 4)):
        loop.step(sequences[:batch])
        assert replays.rows.pop() == rows
    assert loop.finish(*sequences) == [one.expected for one in cases]


def test_what_there_is_no_graph_for_runs_without() -> None:
    loop, _ = with_graphs("qwen3_vl", most=2)
    want = case("qwen3_vl", "one")
    sequences = [loop.of(want) for _ in range(3)]
    loop.step(sequences[:1])
    graphs = loop.runner.graphs
    assert graphs is not None
    assert graphs.takes([Query([0], 0, 1)] * 2)
    assert not graphs.takes([Query([0], 0, 1)] * 3)
    assert not graphs.takes([Query([0], 0, 2)])
    assert graphs.takes([Query([0] * 64, 1023, 1)])
    assert not graphs.takes([Query([0] * 65, 1024, 1)])
    assert loop.finish(*sequences) == [want.expected] * 3


def test_layers_are_told_of_single_tokens_too() -> None:
    loop, replays = with_graphs("qwen2_vl", most=2)
    seq, told = loop.sequence(range(9)), list[tuple[int, int]]()
    loop.step([seq])
    replays.rows.clear()
    loop.runner.run([Scheduled(seq, 9, 1, True)], lambda first, last: told.append((first, last)))
    assert told
    assert not replays.rows


async def test_a_whole_engine_in_a_cache_for_few_equals_generate() -> None:
    """Prompts join sequences that decode, in small chunks, and the newest are swapped out and come back."""
    model, replays = language_model("qwen3_vl"), Replays()
    cache = new_cache(model, num_blocks=34, block_size=4)
    backend = Varlen(cache, varlen_attn)
    graphs = DecodeGraphs(model, cache, backend, 4, 1024, replays)
    runner = Runner(model, cache, backend=backend, graphs=graphs)
    limits = Limits(34, 4, 1024, 6, 64, chunk_while_decoding=24)
    engine = LanguageEngine(limits, runner, cache)
    cases = [case("qwen3_vl", name) for name in ("text", "one", "text", "two", "one", "same", "text", "text")]
    engine.start()
    try:
        async with asyncio.timeout(60):
            streams = [engine.submit(sequence(n, one)) for n, one in enumerate(cases)]
            answers = [[token.token_id async for batch in stream for token in batch] for stream in streams]
        assert answers == [one.expected for one in cases]
        assert engine.stats.free_blocks == 34
        assert engine.stats.preemptions, "there was room for all"
        assert replays.rows
    finally:
        await engine.close()


def sequence(number: int, one: Case) -> Sequence:
    """That of a request, with items that no other request has, so that every prompt is computed."""
    params = SamplingParams(max_tokens=len(one.expected), temperature=0.0)
    items = tuple(replace(item, mm_hash=f"{number}-{item.mm_hash}") for item in one.items)
    return Sequence(f"r{number}", list(one.token_ids), len(one.token_ids), params, items, one.embeddings)


def test_a_step_takes_the_narrowest_graph_that_holds_its_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", 16)
    asked: list[int] = []

    def kernel(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(options["block_table"].shape[1])
        return varlen_attn(query, *arguments, **options)

    loop, _ = with_graphs("qwen2_vl", most=2, max_tokens=200, kernel=kernel)
    loop.budget = loop.chunk = 1 << 30
    for length, width in ((10, 1), (40, 4), (64, 13), (190, 13)):
        seq = loop.sequence([5] * length)
        loop.step([seq])
        asked.clear()
        loop.step([seq])
        assert set(asked) == {width}, length


@given(st.integers(1, 5000), st.sampled_from([1, 16, 256, 4096]))
def test_widths_reach_the_longest_in_few_steps(most: int, block_size: int) -> None:
    found = widths(most, block_size)
    assert found == sorted(set(found))
    assert found[-1] == most
    assert all(wide <= LONGER * narrow for narrow, wide in pairwise(found))


@given(st.integers(1, 600))
def test_buckets_pad_little(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        rows = min(size for size in sizes if size >= count)
        assert rows - count < min(EVERY, count)


def test_the_cache_needs_a_block_for_padding() -> None:
    model = language_model("qwen2_vl")
    layout = new_cache(model).layout
    cache = KVCache(layout, memoryview(bytearray(layout.nbytes)))
    with pytest.raises(ValueError, match="scratch block"):
        DecodeGraphs(model, cache, Varlen(cache, varlen_attn), 2, 64, Replays())


def test_work_is_warmed_up_beside_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cuda.replace(monkeypatch)
    capture = Captures(torch.device("cuda:1"))

    def work() -> torch.Tensor:
        cuda.told.append(f"work on {cuda.current}")
        return torch.ones(2)

    replay = capture(work)
    assert cuda.told == [
        "use cuda:1",
        *("side1 waits for default", "work on side1", "default waits for side1"),
        *("capture with pool, thread_local", "work on default", "captured"),
    ]
    assert replay() is replay()
    assert cuda.told[7:] == ["replay"] * 2
