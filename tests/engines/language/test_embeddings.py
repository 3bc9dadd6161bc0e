from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engines.errors import BadRequest, EngineError, Overloaded
from engines.language.embeddings import EmbeddingReceiver, Fallback
from engines.language.sequence import Item
from engines.transfer import create
from engines.transfer.base import Arena, Transfer
from tests.support.waiting import until

WIDTH = 8


@dataclass
class World:
    """An encoder's transfer and a language engine's receiver."""

    encoder: Transfer
    source: Arena
    receiver: EmbeddingReceiver
    language: Transfer
    used: int = 0

    async def publish(self, item: Item, values: torch.Tensor) -> dict[str, Any]:
        data = values.numpy().tobytes()
        self.source.buffer[self.used : self.used + len(data)] = data
        spans = [(self.used, len(data))]
        self.used += len(data)
        where = await self.encoder.publish(item.mm_hash, self.source, spans, ttl=None, on_free=lambda: None)
        return {"num_tokens": item.num_tokens, "dtype": "float32", "shape": list(values.shape), "where": where}

    async def at_rest(self) -> None:
        ranges = self.receiver.ranges
        await until(lambda: ranges.free == ranges.capacity and not self.language.audit()["tickets"])


@asynccontextmanager
async def world(nbytes: int = 4096, timeout: float = 5.0, fallback: Fallback | None = None) -> AsyncIterator[World]:
    encoder, language = create("memory", timeout=2.0), create("memory", timeout=2.0)
    source, target = encoder.allocate("embeddings", 1 << 16), language.allocate("embeddings", nbytes)
    await encoder.start()
    await language.start()
    try:
        async with asyncio.timeout(30):
            yield World(encoder, source, EmbeddingReceiver(language, target, WIDTH, timeout, fallback), language)
    finally:
        await language.close()
        await encoder.close()


def item(name: str, num_tokens: int = 4) -> Item:
    return Item(name, "image", (1, 2, 2 * num_tokens), 0, num_tokens)


def values(seed: int, num_tokens: int = 4) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


async def test_every_item_gets_its_tensor_and_a_hash_is_fetched_once() -> None:
    async with world() as here:
        items = [item("a"), item("b", 6), item("a")]
        entries = {"a": await here.publish(items[0], values(1)), "b": await here.publish(items[1], values(2, 6))}
        held = await here.receiver.receive(items, entries)
        assert here.language.audit()["tickets"] == 2
        for got, wanted in zip(held.of(items), (values(1), values(2, 6), values(1)), strict=True):
            assert torch.equal(got, wanted)
        held.release()
        held.release()
        await here.at_rest()


async def test_no_items_need_nothing() -> None:
    async with world() as here:
        assert (await here.receiver.receive([], {})).tensors == {}


async def test_one_lost_item_fails_the_request_and_frees_the_others() -> None:
    async with world() as here:
        items = [item("a"), item("b")]
        entries = {one.mm_hash: await here.publish(one, values(1)) for one in items}
        here.encoder.withdraw("b")
        with pytest.raises(EngineError) as raised:
            await here.receiver.receive(items, entries)
        assert (raised.value.code, raised.value.stage, raised.value.retryable) == ("embedding_gone", "encode", True)
        await here.at_rest()


class Elsewhere:
    """A fallback that has some embeddings."""

    def __init__(self, rows: dict[str, torch.Tensor]) -> None:
        self._rows = rows

    async def get(self, mm_hash: str, dtype: str, target: memoryview) -> bool:
        await asyncio.sleep(0)
        assert dtype == "float32"
        if mm_hash in self._rows:
            target[:] = self._rows[mm_hash].numpy().tobytes()
        return mm_hash in self._rows


async def test_what_its_encoder_has_lost_comes_from_the_fallback_where_that_has_it() -> None:
    async with world(fallback=Elsewhere({"b": values(2)})) as here:
        items = [item("a"), item("b")]
        entries = {one.mm_hash: await here.publish(one, values(1)) for one in items}
        here.encoder.withdraw("b")
        held = await here.receiver.receive(items, entries)
        assert torch.equal(held.tensors["a"], values(1)) and torch.equal(held.tensors["b"], values(2))
        held.release()
        await here.at_rest()
        here.encoder.withdraw("a")
        with pytest.raises(EngineError, match="the embedding of a is lost"):
            await here.receiver.receive(items, entries)
        await here.at_rest()


async def test_cancelling_frees_everything() -> None:
    async with world() as here:
        writing, go_on = threading.Event(), threading.Event()

        def slow(_moves: Any) -> None:
            writing.set()
            assert go_on.wait(20)

        here.encoder.plane.script = slow  # type: ignore[attr-defined]
        entries = {"a": await here.publish(item("a"), values(1))}
        task = asyncio.create_task(here.receiver.receive([item("a")], entries))
        await until(writing.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert here.receiver.ranges.free < here.receiver.ranges.capacity  # the writer is not done with it
        go_on.set()
        await here.at_rest()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"shape": [4, 9]}, "ec_transfer_params.a.shape"),
        ({"shape": [5, 8]}, "ec_transfer_params.a.shape"),
        ({"shape": None}, "ec_transfer_params.a.shape"),
        ({"dtype": "int8"}, "ec_transfer_params.a"),
        ({"where": None}, "ec_transfer_params.a"),
    ],
)
async def test_an_entry_that_does_not_fit_is_refused(change: dict[str, Any], param: str) -> None:
    async with world() as here:
        entry = {**await here.publish(item("a"), values(1)), **change}
        with pytest.raises(BadRequest) as raised:
            await here.receiver.receive([item("a")], {"a": entry})
        assert raised.value.param == param
        await here.at_rest()


async def test_a_missing_entry_says_that_there_is_no_encoder() -> None:
    async with world() as here:
        with pytest.raises(BadRequest, match="no encoder"):
            await here.receiver.receive([item("a")], {})


async def test_requests_wait_for_room_in_their_order() -> None:
    async with world(nbytes=256) as here:
        entries = {name: await here.publish(item(name), values(1)) for name in "abc"}
        held = [await here.receiver.receive([item("a")], entries), await here.receiver.receive([item("b")], entries)]
        order: list[str] = []

        async def late(*names: str) -> None:
            got = await here.receiver.receive([item(name) for name in names], entries)
            order.append("".join(names))
            got.release()

        async with asyncio.TaskGroup() as group:
            group.create_task(late("a", "b"))  # needs all the room
            await asyncio.sleep(0)
            group.create_task(late("c"))
            for one in held:
                await asyncio.sleep(0.01)
                assert order == []
                one.release()
        assert order == ["ab", "c"]
        await here.at_rest()


async def test_no_room_in_time_is_overload_and_no_room_ever_is_a_bad_request() -> None:
    async with world(nbytes=128, timeout=0.1) as here:
        entries = {name: await here.publish(item(name), values(1)) for name in "ab"}
        held = await here.receiver.receive([item("a")], entries)
        with pytest.raises(Overloaded, match="--embedding-bytes"):
            await here.receiver.receive([item("b")], entries)
        with pytest.raises(BadRequest, match="256 bytes, this engine holds 128"):
            await here.receiver.receive([item("a"), item("b")], entries)
        held.release()
        await here.at_rest()


class Borrowed:
    """A `Loan`: the rows of an encoder beside us, once they are `written`."""

    def __init__(self, rows: torch.Tensor | EngineError) -> None:
        self._rows = rows
        self.written = asyncio.Event()
        self.released = 0

    async def rows(self) -> torch.Tensor:
        await self.written.wait()
        if isinstance(self._rows, EngineError):
            raise self._rows
        return self._rows

    def release(self) -> None:
        self.released += 1


async def test_what_lies_here_already_is_read_in_place_beside_what_is_fetched() -> None:
    async with world() as w:
        ours, theirs = item("ours"), item("theirs")
        rows, wanted = values(1), values(2)
        loan, arrived = Borrowed(rows), asyncio.Queue[None]()
        entries = {"ours": loan, "theirs": await w.publish(theirs, wanted)}
        async with w.receiver.receiving([ours, theirs, ours], entries, lambda: arrived.put_nowait(None)) as held:
            await arrived.get()
            assert held.of([ours]) == [None], "it is not written yet"
            loan.written.set()
            await arrived.get()
            got, fetched = held.of([ours, theirs])
            assert got is rows and fetched is not None and fetched.equal(wanted)
        assert not loan.released
        held.release()
        assert loan.released == 1
        await w.at_rest()


async def test_a_loan_that_fails_is_raised_and_given_back() -> None:
    async with world() as w:
        loan = Borrowed(EngineError("the vision model failed", code="encode_failed"))
        loan.written.set()
        with pytest.raises(EngineError, match="the vision model failed"):
            await w.receiver.receive([item("ours")], {"ours": loan})
        assert loan.released == 1
        await w.at_rest()
