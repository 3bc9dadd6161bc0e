"""Rank 0's side; that the others then do the same is in `test_follower`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from engines.errors import ShuttingDown
from engines.language.parallel.group import Alone
from engines.language.parallel.messages import (
    Command,
    CopyBlock,
    Errands,
    Forget,
    Load,
    Restore,
    Save,
    Stage,
    Step,
    Write,
    packed,
)
from engines.language.parallel.steps import ParallelCache, ParallelRunner, Steps
from engines.language.parallel.wire import Wire
from engines.language.runner import BadEmbeddings
from engines.language.sequence import Scheduled
from tests.support.drive import Driver, case, driver
from tests.support.fake_runner import FakeCache

WRITE = Write(1, b"source", b"target", staged=False, last=False)


class Recorded(Wire):
    """What the others would hear."""

    def __init__(self) -> None:
        self.heard: list[Command] = []
        self.broken = False

    def send(self, data: bytes) -> None:
        if self.broken:
            raise BrokenPipeError("the other end is gone")
        self.heard.append(msgspec.msgpack.decode(data, type=Command))


@pytest.fixture
def wire() -> Recorded:
    return Recorded()


@pytest.fixture
def reasons() -> list[str]:
    return []


@pytest.fixture
def steps(wire: Recorded, reasons: list[str]) -> Steps:
    return Steps([wire], reasons.append)


def scheduled(of: Driver, name: str, count: int) -> Scheduled:
    return Scheduled(of.of(case("qwen3_vl", name)), 0, count, sample=False)


def test_a_step_is_told_with_the_rows_that_it_needs(wire: Recorded, steps: Steps) -> None:
    own, group, spread = driver("qwen3_vl"), Alone(), list[torch.Tensor]()
    group.spread = spread.append  # type: ignore[method-assign]
    entry = scheduled(own, "one", 10)
    ParallelRunner(own.runner, steps, group).run([entry], None)
    (told,) = wire.heard
    assert isinstance(told, Step)
    assert told.token_ids == packed(entry.seq.token_ids[:10])
    assert (told.shares[0].start, told.shares[0].count) == (0, 10)
    item = entry.seq.items[0]
    (rows,) = told.patches
    width = own.runner.model.facts.embedding_width
    assert (rows.first, rows.count, rows.width, rows.dtype) == (item.offset, 10 - item.offset, width, "float32")
    assert spread[0].equal(entry.seq.embeddings[0][: rows.count])  # type: ignore[index]


def test_errands_of_a_group_of_layers_are_told_in_the_midst_of_the_step(wire: Recorded, steps: Steps) -> None:
    own = driver("qwen3_vl")
    own.runner.layers_per_push = 2
    ParallelRunner(own.runner, steps, Alone()).run(
        [scheduled(own, "text", 4)], lambda first, last: steps.errand(WRITE) if first == 0 else None
    )
    assert wire.heard[1:] == [Errands([WRITE]), Errands([]), Errands([])]


def test_a_step_that_cannot_be_packed_is_told_to_nobody(wire: Recorded, steps: Steps, reasons: list[str]) -> None:
    own = driver("qwen3_vl")
    entry = scheduled(own, "one", 10)
    entry.seq.embeddings = None
    with pytest.raises(BadEmbeddings):
        ParallelRunner(own.runner, steps, Alone()).run([entry], None)
    assert wire.heard == reasons == []


@pytest.fixture(params=["model", "wire"])
def broken(request: pytest.FixtureRequest, wire: Recorded, steps: Steps, monkeypatch: Any) -> Iterator[ParallelRunner]:
    own = driver("qwen3_vl")
    if request.param == "wire":
        wire.broken = True
    else:
        monkeypatch.setattr(own.runner, "forward", lambda *_: 1 / 0)
    yield ParallelRunner(own.runner, steps, Alone())


def test_a_step_that_breaks_ends_the_engine_once(
    broken: ParallelRunner, wire: Recorded, steps: Steps, reasons: list[str]
) -> None:
    for _ in range(2):
        with pytest.raises(ShuttingDown, match="send the request to another"):
            broken.run([scheduled(driver("qwen3_vl"), "text", 4)], None)
    assert len(reasons) == 1
    with pytest.raises(ShuttingDown):
        steps.tell(CopyBlock(0, 1))


def test_the_others_do_with_their_blocks_what_is_done_here(wire: Recorded, steps: Steps) -> None:
    cache = FakeCache(8, 4)
    whole = ParallelCache(cache, steps)
    assert whole.layout is cache.layout
    cache.write([3], 0, 77)
    whole.load([5])
    whole.copy_block(3, 4)
    saved = whole.save([3, 4])
    whole.restore(saved, [6, 7])
    assert cache.read([7], 1) == [77]
    assert wire.heard == [Load(packed([5])), CopyBlock(3, 4), Save(0, packed([3, 4])), Restore(0, packed([6, 7]))]
    del saved
    gc.collect()
    whole.load([1])
    assert wire.heard[-2:] == [Forget([0]), Load(packed([1]))]


def test_only_a_cache_that_is_mirrored_is_staged_elsewhere(wire: Recorded, steps: Steps) -> None:
    arena = memoryview(bytearray(FakeCache(8, 4).layout.nbytes))
    assert ParallelCache(FakeCache(8, 4, arena), steps).stage(range(2), [1]) is None
    steps.run_errands()
    ready = ParallelCache(FakeCache(8, 4, arena, apart=True), steps).stage(range(1, 2), [1])
    assert ready is not None
    ready()
    steps.run_errands()
    assert wire.heard == [Errands([]), Errands([Stage(1, 2, packed([1]))])]
