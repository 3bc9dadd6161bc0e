from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engines.errors import BadRequest, EngineError, Overloaded, SetupError
from engines.language.embedding_rows import Embeddings, Rows
from engines.language.embeddings import EmbeddingReceiver, Fallback, Room
from engines.language.sequence import Item
from engines.transfer import create
from engines.transfer.base import Arena, Transfer
from tests.support.waiting import until

WIDTH = 8
BLOCK = 2
"""Tokens in a block; an item has two of these unless it is said."""


@dataclass
class World:
    """An encoder's transfer and a language engine's receiver."""

    encoder: Transfer
    source: Arena
    receiver: EmbeddingReceiver
    language: Transfer
    used: int = 0
    read: list[str] = field(default_factory=list)

    async def publish(self, item: Item, values: torch.Tensor, promised: bool = False) -> dict[str, Any]:
        data = values.numpy().tobytes()
        self.source.buffer[self.used : self.used + len(data)] = data
        spans = [(self.used, len(data))]
        self.used += len(data)
        where = await self.encoder.publish(
            *(item.mm_hash, self.source, spans),
            ttl=None,
            on_free=lambda: None,
            on_read=lambda: self.read.append(item.mm_hash),
            promised=promised,
        )
        return {"num_tokens": item.num_tokens, "dtype": "float32", "shape": list(values.shape), "where": where}

    async def at_rest(self) -> None:
        receiver = self.receiver
        await until(lambda: receiver.free == receiver.capacity and not self.language.audit()["tickets"])
        receiver.pool.check()


@asynccontextmanager
async def world(
    blocks: int = 32, timeout: float = 5.0, fallback: Fallback | None = None, default_tokens: int = 0
) -> AsyncIterator[World]:
    encoder, language = create("memory", timeout=2.0), create("memory", timeout=2.0)
    source, target = (
        encoder.allocate("embeddings", 1 << 16),
        language.allocate("embeddings", blocks * BLOCK * WIDTH * 4),
    )
    await encoder.start()
    await language.start()
    try:
        async with asyncio.timeout(30):
            room = Room(BLOCK, default_tokens)
            yield World(encoder, source, EmbeddingReceiver(language, target, WIDTH, timeout, fallback, room), language)
    finally:
        await language.close()
        await encoder.close()


def item(name: str, num_tokens: int = 4, offset: int = 0) -> Item:
    return Item(name, "image", (1, 2, 2 * num_tokens), offset, num_tokens)


def values(seed: int, num_tokens: int = 4) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


async def test_every_item_gets_its_tensor_and_a_hash_is_fetched_once() -> None:
    async with world() as here:
        items = [item("a"), item("b", 6), item("a")]
        entries = {"a": await here.publish(items[0], values(1)), "b": await here.publish(items[1], values(2, 6))}
        held = await here.receiver.receive(items, entries)
        assert here.language.audit()["tickets"] == 2
        for number, wanted in enumerate((values(1), values(2, 6), values(1))):
            assert torch.equal(held.whole(number), wanted)
        held.release()
        held.release()
        await here.at_rest()


async def test_no_items_need_nothing() -> None:
    async with world() as here:
        assert (await here.receiver.receive([], {})).missing is None


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
        self.asked: list[str] = []

    async def get(self, mm_hash: str, dtype: str, target: memoryview) -> bool:
        self.asked.append(mm_hash)
        await asyncio.sleep(0.01)
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
        assert torch.equal(held.whole(0), values(1)) and torch.equal(held.whole(1), values(2))
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
        assert here.receiver.free < here.receiver.capacity  # the writer is not done with it
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
    async with world(blocks=4) as here:
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
    async with world(blocks=2, timeout=0.1) as here:
        entries = {name: await here.publish(item(name), values(1)) for name in "ab"}
        held = await here.receiver.receive([item("a")], entries)
        with pytest.raises(Overloaded, match="--embedding-bytes"):
            await here.receiver.receive([item("b")], entries)
        with pytest.raises(BadRequest, match="take 4 blocks of 64 bytes, this engine holds 2"):
            await here.receiver.receive([item("a"), item("b")], entries)
        held.release()
        await here.at_rest()


async def test_an_arena_of_less_than_two_blocks_is_refused() -> None:
    with pytest.raises(SetupError, match="less than two blocks of 64 bytes"):
        async with world(blocks=1):
            pass


# -- as prompts run


class Prompt:
    """A prompt whose rows are computed as soon as they are here, and checked."""

    def __init__(
        self, here: World, items: Sequence[Item], entries: dict[str, Any], rows: dict[str, torch.Tensor]
    ) -> None:
        self.here, self.items, self.entries, self.expected = here, items, entries, rows
        self.length = items[-1].offset + items[-1].num_tokens + 1
        self.computed = 0
        self.most = 0  # blocks held at a time
        self.more = asyncio.Event()

    async def run(self, cached: int = 0) -> Prompt:
        pool = self.here.receiver.pool
        async with self.here.receiver.receiving(self.items, self.entries, self.more.set) as held:
            held.compute(cached)
            self.computed = cached
            while self.computed < self.length:
                self.more.clear()
                self.most = max(self.most, pool.capacity - pool.free)
                end = self.length if held.missing is None else held.missing
                if end <= self.computed:
                    await self.more.wait()
                    continue
                self._check(held, end)
                self.computed = end
                held.compute(end)
            held.release()
        return self

    def _check(self, held: Embeddings, end: int) -> None:
        for number, one in enumerate(self.items):
            first, last = max(self.computed, one.offset), min(end, one.offset + one.num_tokens)
            if first < last:
                at = one.row - one.offset
                rows = held.rows[number]
                assert rows is not None
                assert torch.equal(rows[at + first : at + last], self.expected[one.mm_hash][at + first : at + last])


async def prompt(here: World, *items: Item) -> Prompt:
    rows = {one.mm_hash: values(ord(one.mm_hash), one.num_rows) for one in items}
    entries = {name: await here.publish(next(i for i in items if i.mm_hash == name), rows[name]) for name in rows}
    return Prompt(here, items, entries, rows)


@pytest.mark.parametrize("default_tokens", [0, BLOCK, 5], ids=["whole", "one block", "three blocks"])
async def test_a_request_larger_than_the_pool_comes_piece_by_piece(default_tokens: int) -> None:
    async with world(blocks=4, default_tokens=default_tokens) as here:
        asked = await prompt(here, item("a", 21, offset=3), item("b", 1, offset=25), item("a", 21, offset=30))
        await asked.run()
        assert asked.most <= 4
        await until(
            lambda: here.read == ["b", "a"]
        )  # an encoder keeps what is wanted twice until it has been read twice
        await here.at_rest()


async def test_a_video_in_pieces_comes_piece_by_piece() -> None:
    frames = [Item("v", "video", (1, 2, 10), 2 + 7 * n, 5, row=5 * n, rows=20) for n in range(4)]
    for default_tokens in (0, BLOCK):
        async with world(blocks=6, default_tokens=default_tokens) as here:
            await (await prompt(here, *frames)).run()
            await here.at_rest()


async def test_room_for_an_item_comes_back_when_it_is_computed_not_at_the_end() -> None:
    async with world(blocks=8) as here:
        asked = await prompt(here, item("a", 4), item("b", 4, offset=4))
        async with here.receiver.receiving(asked.items, asked.entries, asked.more.set) as held:
            await until(lambda: held.missing is None)
            assert here.receiver.pool.free == 4
            held.compute(4)
            assert (here.receiver.pool.free, held.rows[0]) == (6, Rows((4, WIDTH)))
            assert torch.equal(held.whole(1), values(ord("b")))
            held.release()
        await here.at_rest()


async def test_what_the_prefix_cache_has_is_not_fetched() -> None:
    async with world(blocks=4, default_tokens=BLOCK) as here:
        asked = await prompt(here, item("a", 20), item("b", 2, offset=20), item("c", 20, offset=22))
        here.encoder.withdraw("b")
        await asked.run(cached=25)
        await here.at_rest()


@pytest.mark.parametrize("seed", range(4))
async def test_many_requests_share_a_small_pool_and_all_end(seed: int) -> None:
    dice = random.Random(seed)
    async with world(blocks=8, default_tokens=BLOCK * dice.randrange(3)) as here:
        asked = []
        for number in range(6):
            sizes = [dice.randrange(1, 24) for _ in range(dice.randrange(1, 4))]
            items = [item(f"{number}{at}", tokens, offset=sum(sizes[:at])) for at, tokens in enumerate(sizes)]
            rows = {one.mm_hash: values(seed, one.num_tokens) for one in items}
            entries = {one.mm_hash: await here.publish(one, rows[one.mm_hash]) for one in items}
            asked.append(Prompt(here, items, entries, rows))
        await asyncio.gather(*(one.run() for one in asked))
        await here.at_rest()


async def test_a_request_that_has_nothing_to_compute_waits_for_room_for_a_while_and_a_queued_one_without_end() -> None:
    async with world(blocks=4, timeout=0.5) as here:
        pool, asked = here.receiver.pool, await prompt(here, item("a", 20))
        other = pool.claim()
        pool.start(other)
        theirs = await pool.take(other, 2, 2)
        with pytest.raises(Overloaded, match="no room"):
            async with here.receiver.receiving(asked.items, asked.entries) as held:
                try:
                    await until(lambda: held.missing == BLOCK)
                    await asyncio.sleep(0.7)  # it is queued: nothing presses
                    more = asyncio.create_task(pool.take(other, 2, 2))
                    await asyncio.sleep(0)
                    held.compute(BLOCK)
                    theirs += await more
                    await asyncio.sleep(10)
                finally:
                    held.release()
        pool.give_back(theirs)
        await here.at_rest()


async def test_rows_that_come_while_it_waits_for_room_give_a_request_time() -> None:
    async with world(blocks=8, timeout=0.5) as here:
        pool = here.receiver.pool
        other = pool.claim()
        pool.start(other)
        theirs = await pool.take(other, 5, 5)
        entries = {"a": await here.publish(item("a", 40), values(1, 40), promised=True)}
        async with here.receiver.receiving([item("a", 40)], entries) as held:
            held.compute(0)
            await until(lambda: here.encoder.audit()["pushes"] == 2)
            assert held.missing == 0
            here.encoder.fulfil("a")
            await until(lambda: held.missing == 2 * BLOCK)
            await asyncio.sleep(0.7)
            assert held.missing == 2 * BLOCK
            held.release()
        pool.give_back(theirs)
        await here.at_rest()


async def test_an_encoder_that_loses_an_item_between_two_pieces_fails_the_request_and_frees_all() -> None:
    async with world(blocks=4, default_tokens=BLOCK) as here:
        asked = await prompt(here, item("a", 40))
        with pytest.raises(EngineError) as raised:
            async with here.receiver.receiving(asked.items, asked.entries, asked.more.set) as held:
                try:
                    await until(lambda: held.missing == 3 * BLOCK)
                    here.encoder.withdraw("a")
                    held.compute(3 * BLOCK)
                    await asyncio.sleep(10)
                finally:
                    held.release()
        assert (raised.value.code, raised.value.retryable) == ("embedding_gone", True)
        await here.at_rest()


async def test_what_is_lost_between_two_pieces_comes_from_the_fallback_once_for_all_of_them() -> None:
    rows = values(ord("a"), 40)
    fallback = Elsewhere({"a": rows})
    async with world(blocks=4, default_tokens=BLOCK, fallback=fallback) as here:
        asked = await prompt(here, item("a", 40))
        async with here.receiver.receiving(asked.items, asked.entries) as held:
            await until(lambda: held.missing == 3 * BLOCK)
            here.encoder.withdraw("a")
            held.compute(3 * BLOCK)
            await until(lambda: held.missing is None)
            found = held.rows[0]
            assert found is not None
            assert torch.equal(found[3 * BLOCK : 40], rows[3 * BLOCK :])
            assert fallback.asked == ["a"]
            held.release()
        await here.at_rest()


async def test_leaving_while_waiting_for_room_frees_all() -> None:
    async with world(blocks=4, default_tokens=BLOCK) as here:
        asked = await prompt(here, item("a", 40))
        for ended_at in (0, 1, 3):
            async with here.receiver.receiving(asked.items, asked.entries) as held:
                if ended_at:
                    await until(lambda held=held, ended_at=ended_at: held.missing >= ended_at * BLOCK)
                held.release()
            await here.at_rest()
