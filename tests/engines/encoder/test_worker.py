"""The model thread: what shares a batch, who fails with whom, and who may still leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from engines.encoder.batch import Batcher
from engines.encoder.worker import ModelThreads
from engines.errors import EngineError
from tests.support.waiting import until


@dataclass(frozen=True, eq=False)
class Item:
    patches: int = 1
    broken: bool = False


class Model:
    """Doubles patches, once the gate is open; records its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[Item]] = []
        self.entered = threading.Semaphore(0)

    def __call__(self, batch: Sequence[Item], outputs: Sequence[list[int]]) -> None:
        self.batches.append(list(batch))
        self.entered.release()
        assert self.gate.wait(30)
        if any(item.broken for item in batch):
            raise RuntimeError("cannot compute")
        for item, output in zip(batch, outputs, strict=True):
            output.append(2 * item.patches)

    async def enter(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


class Seen(list[tuple[int, int]]):
    def __call__(self, items: int, patches: int, seconds: float) -> None:
        assert seconds >= 0
        self.append((items, patches))


@asynccontextmanager
async def running(budget: int = 10, depth: int = 1) -> AsyncIterator[tuple[ModelThreads, Model, Seen]]:
    model, seen = Model(), Seen()
    async with asyncio.timeout(30):
        try:
            async with ModelThreads([model], Batcher(budget), seen, depth) as thread:
                yield thread, model, seen
                model.gate.set()
        finally:
            model.gate.set()


def start(thread: ModelThreads, *items: Item) -> list[asyncio.Task[int]]:
    async def one(item: Item) -> int:
        output: list[int] = []
        await thread.encode(item, output, lambda: None)
        return output[0]

    return [asyncio.create_task(one(item)) for item in items]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_arrives_while_a_batch_computes_shares_the_next() -> None:
    async with running() as (thread, model, seen):
        first = start(thread, Item(3))
        await model.enter()
        rest = start(thread, Item(4), Item(5), Item(6))
        await settle()
        assert (thread.waiting, thread.patches, thread.running) == (3, 15, 1)
        model.gate.set()
        assert await asyncio.gather(*first, *rest) == [6, 8, 10, 12]
        assert seen == [(1, 3), (2, 9), (1, 6)]
        assert (thread.waiting, thread.patches, thread.running) == (0, 0, 0)


async def test_a_broken_item_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (thread, model, _):
        first = start(thread, Item())
        await model.enter()
        tasks = start(thread, Item(2), Item(broken=True), Item(4))
        await settle()
        model.gate.set()
        results = await asyncio.gather(*first, *tasks, return_exceptions=True)
        assert [results[1], results[3]] == [4, 8]
        assert isinstance(results[2], EngineError)
        assert results[2].code == "encode_failed"
        assert [len(batch) for batch in model.batches] == [1, 3, 1, 1, 1]
        assert await start(thread, Item(5))[0] == 10, "the thread goes on"
    assert "a forward over 3 items failed" in caplog.text


async def test_a_waiting_item_may_leave() -> None:
    async with running() as (thread, model, _):
        first = start(thread, Item())
        await model.enter()
        leaver, stayer = start(thread, Item(7), Item(8))
        await settle()
        leaver.cancel()
        await settle()
        assert thread.patches == 8
        model.gate.set()
        assert await asyncio.gather(*first, stayer) == [2, 16]
        assert [item.patches for batch in model.batches for item in batch] == [1, 8]


async def test_an_item_cancelled_in_the_turn_its_batch_starts_is_not_computed() -> None:
    """Between `cancel` and the coroutine's own cleanup the item is still queued; its memory is as good as gone."""
    async with running() as (thread, model, _):
        taken: list[str] = []
        output: list[int] = []
        task = asyncio.create_task(thread.encode(Item(3), output, lambda: taken.append("taken")))
        await asyncio.sleep(0)  # it waits; the pump has not run
        task.cancel()
        await settle()
        model.gate.set()
        assert (taken, output, model.batches) == ([], [], [])


async def test_who_prepares_items_is_held_back_by_what_waits() -> None:
    async with running(budget=5) as (thread, model, _):
        first = start(thread, Item())
        await model.enter()
        tasks = start(thread, Item(5), Item(5))
        await settle()
        room = asyncio.create_task(thread.room())
        await settle()
        assert not room.done()
        tasks[0].cancel()
        await room
        model.gate.set()
        await asyncio.gather(*first, tasks[1])


async def test_closing_ends_the_batch_and_cancels_what_waits() -> None:
    async with running() as (thread, model, _):
        first = start(thread, Item(2))
        await model.enter()
        waiting = start(thread, Item(3))
        await settle()
        threading.Timer(0.05, model.gate.set).start()
    assert await first[0] == 4
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]


async def test_what_waits_is_shared_out_over_idle_devices_and_each_gets_as_much_as_it_may() -> None:
    models, seen = [Model(), Model()], Seen()
    async with asyncio.timeout(30), ModelThreads(models, Batcher(10), seen, depth=2) as thread:
        try:
            first = start(thread, Item(1), Item(2), Item(3))
            for model in models:
                await model.enter()
            rest = start(thread, Item(4), Item(5), Item(6))
            for model in models:
                await model.enter()
            last = start(thread, Item(7))
            await settle()
            assert (thread.waiting, thread.running) == (1, 6), "two batches for each device, and no more"
            sizes = [[[item.patches for item in batch] for batch in model.batches] for model in models]
            assert sizes == [[[1, 2], [4, 5]], [[3], [6]]]
        finally:
            for model in models:
                model.gate.set()
        assert await asyncio.gather(*first, *rest, *last) == [2, 4, 6, 8, 10, 12, 14]


async def test_an_item_that_no_device_can_compute_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    models = [Model(), Model()]
    for model in models:
        model.gate.set()
    async with asyncio.timeout(30), ModelThreads(models, Batcher(10)) as thread:
        broken, good = start(thread, Item(broken=True), Item(3))
        assert await good == 6
        with pytest.raises(EngineError, match="cannot compute"):
            await broken
        assert [sum(item.broken for batch in model.batches for item in batch) for model in models] == [1, 1]
        assert not any(worker.broken for worker in thread._workers)
    assert "a forward over 1 items failed" in caplog.text


async def test_what_a_broken_device_fails_on_another_computes_and_then_gets_all_it_can_take() -> None:
    works, ill = Model(), True
    works.gate.set()
    tried = list[int]()

    def breaks(batch: Sequence[Item], outputs: Sequence[list[int]]) -> None:
        tried.append(len(batch))
        if ill:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        works(batch, outputs)

    async with asyncio.timeout(30), ModelThreads([breaks, works], Batcher(10)) as thread:
        assert await asyncio.gather(*start(thread, Item(2))) == [4]
        assert tried == [1]
        for patches in range(1, 6):
            assert await asyncio.gather(*start(thread, Item(patches))) == [2 * patches]
        assert tried == [1], "it is not asked while the other has nothing to do"

        works.gate.clear()
        first = start(thread, Item(3))
        await settle()
        second = start(thread, Item(4))
        await until(lambda: tried == [1, 1])
        works.gate.set()
        assert await asyncio.gather(*first, *second) == [6, 8], "it is asked again when there is no other"

        ill = False
        works.gate.clear()
        first = start(thread, Item(5))
        await settle()
        second = start(thread, Item(6))
        await until(lambda: tried == [1, 1, 1])
        works.gate.set()
        assert await asyncio.gather(*first, *second) == [10, 12]
        assert not any(worker.broken for worker in thread._workers)
