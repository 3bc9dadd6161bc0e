from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engines.language.model import LanguageModel
from engines.language.parallel.follower import Follower
from engines.language.parallel.group import Alone, Processes
from engines.language.parallel.messages import Errands, Share, Step, Write, packed, packed_spans
from engines.language.parallel.steps import ParallelCache, ParallelRunner, Steps
from engines.language.parallel.wire import Wire
from engines.language.runner import Runner
from tests.support.checkpoints import checkpoint
from tests.support.drive import CASES, Driver, case, new_cache
from tests.support.fake_runner import FakeCache
from tests.support.threads import on_ranks


def test_a_follower_computes_what_rank_0_schedules() -> None:
    """Two ranks in two threads: rank 0 schedules, forks and swaps, rank 1 knows no sequence at all."""
    ours, theirs = socket.socketpair()
    wanted = [case("qwen3_vl", name) for name in CASES]

    def work(group: Processes) -> list[list[int]]:
        model = LanguageModel.load(checkpoint("qwen3_vl"), group=group)
        cache = new_cache(model)
        if group.rank:
            Follower(Wire(theirs, None), group, (cache, Runner(model, cache)), no_write, no_copy).run()
            return []
        try:
            return lead(Runner(model, cache), cache, group)
        finally:
            ours.close()

    def lead(runner: Runner, own: Any, group: Processes) -> list[list[int]]:
        steps = Steps([Wire(ours, 10.0)], reasons.append)
        cache = ParallelCache(own, steps)
        driver = Driver(runner, chunk=48)
        driver.runner = Led(ParallelRunner(runner, steps, group), runner)  # type: ignore[assignment]
        chains = [driver.of(one) for one in wanted]
        for _ in range(8):
            driver.step(chains)
        moved = chains[0]
        saved, held = cache.save(moved.block_table), moved.block_table
        moved.block_table = [driver.free.pop() for _ in held]
        cache.restore(saved, moved.block_table)
        copied = chains[1]
        last = copied.block_table[-1]
        copied.block_table[-1] = driver.free.pop()
        cache.copy_block(last, copied.block_table[-1])
        return driver.finish(*chains)

    reasons: list[str] = []
    assert on_ranks(2, work)[0] == [one.expected for one in wanted]
    assert reasons == []
    theirs.close()


class Led:
    """`Driver` asks a runner for the cache's size, too."""

    def __init__(self, whole: ParallelRunner, own: Runner) -> None:
        self.cache = own.cache
        self.run = lambda batch: whole.run(batch, None)


def no_write(*_: Any) -> None:
    raise AssertionError("nothing is pushed")


def no_copy(*_: Any) -> None:
    raise AssertionError("nothing is staged")


@dataclass
class Recorder:
    """Stands for a runner; `during` is what it calls in the midst of a step."""

    during: list[tuple[int, int]] = field(default_factory=list)
    packs: list[Any] = field(default_factory=list)

    def forward(self, pack: Any, on_layers: Any) -> torch.Tensor:
        self.packs.append(pack)
        for first, last in self.during:
            on_layers(first, last)
        return torch.empty(0)


STEP = Step(packed([1]), packed([0, 0, 0]), [Share(packed([3]), 0, 1)], [], [0], errands=True)


@contextmanager
def following(runner: Recorder, cache: FakeCache, writes: list[Any], copies: list[Any]) -> Iterator[Steps]:
    ours, theirs = socket.socketpair()
    follower = Follower(
        Wire(theirs, None),
        Alone(),
        (cache, runner),  # type: ignore[arg-type]
        lambda *told: writes.append(told),
        copies.append,
    )
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        yield Steps([Wire(ours, 5.0)], lambda reason: None)
    finally:
        ours.close()
        thread.join(10)
        assert not thread.is_alive()
        theirs.close()


def test_errands_are_done_in_the_midst_of_a_step() -> None:
    runner, writes, copies = Recorder(during=[(0, 1), (1, 2)]), list[Any](), list[Any]()
    arena = memoryview(bytearray(FakeCache(8, 4).layout.nbytes))
    own = FakeCache(8, 4, memoryview(bytearray(arena.nbytes)), apart=True)
    with following(runner, FakeCache(8, 4, arena, apart=True), writes, copies) as steps:
        steps.tell(STEP)
        for layer in range(2):
            ready = ParallelCache(own, steps).stage(range(layer, layer + 1), [3])
            assert ready is not None
            steps.errand(Write(9, packed_spans([(0, 4)]), packed_spans([(8, 4)]), staged=layer == 1, last=layer == 1))
            steps.run_errands()
    assert writes == [(9, [(0, 4)], [(8, 4)], None, False), (9, [(0, 4)], [(8, 4)], copies[1], True)]
    assert len(copies) == 2


@pytest.mark.parametrize("forgets", [True, False])
def test_what_is_saved_is_kept_until_it_is_forgotten(forgets: bool) -> None:
    cache, own = FakeCache(8, 4), FakeCache(8, 4)
    cache.write([2], 1, 55)
    with following(Recorder(), cache, [], []) as steps:
        whole = ParallelCache(own, steps)
        saved = whole.save([2])
        if forgets:
            saved = whole.save([5])  # the first is gone, and its number with it
        whole.restore(saved, [6])
    assert cache.read([6], 2) == [-1, -1 if forgets else 55]


def test_errands_outside_a_step_are_a_bug() -> None:
    ours, theirs = socket.socketpair()
    follower = Follower(Wire(theirs, None), Alone(), (FakeCache(8, 4), Recorder()), no_write, no_copy)  # type: ignore[arg-type]
    Steps([Wire(ours, 5.0)], lambda reason: None).tell(Errands([]))
    with pytest.raises(RuntimeError, match="outside a step"):
        follower.run()
    ours.close()
    theirs.close()
