"""From item to handle: sharing, room, eviction, cancellation; over a real pool, model thread and transfer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.encoder.cache import Entry
from engines.errors import BadRequest, EngineError, Overloaded, TooLarge
from engines.store.records import Record
from engines.transfer.base import GoneError, TransferError
from tests.support.encoding import TOKEN_BYTES, Toy, embedding, item, toy_encoder
from tests.support.waiting import until

NEVER_HELD = {"handle_ttl": 1e-9}


async def encoded(toy: Toy, tokens: int, seed: str, *, named: bool = True) -> Entry:
    entry = await toy.encoder.encode(item(tokens, seed))
    if named:
        toy.encoder.named(entry)
    toy.encoder.release(entry)
    return entry


async def test_an_embedding_can_be_fetched_where_the_handle_says() -> None:
    async with toy_encoder() as toy:
        entry = await encoded(toy, 5, "cat")
        value = entry.value
        assert (value.grid, value.tokens, value.dtype, value.shape) == ((1, 1, 5), 5, "float32", (5, 16))
        got = await toy.fetch(value.where, entry.nbytes)
        assert got.equal(embedding(5, "cat"))
        toy.check()


async def test_the_same_content_is_encoded_once() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        together = [asyncio.create_task(toy.encoder.encode(item(3, "cat"))) for _ in range(4)]
        await asyncio.to_thread(toy.model.entered.acquire)
        toy.model.gate.set()
        entries = {await task for task in together} | {await toy.encoder.encode(item(3, "cat"))}
        assert (len(entries), toy.model.items) == (1, 1)
        (entry,) = entries
        assert entry.pins == 5


async def test_a_uuid_is_the_identity_and_spares_the_fetch() -> None:
    async with toy_encoder() as toy:
        first = await toy.encoder.encode(item(3, "cat", uuid="a" * 64))
        again = await toy.encoder.encode(item(3, "broken", uuid="a" * 64))
        other = await toy.encoder.encode(item(3, "cat", uuid="a" * 64, size={"longest_edge": 9}))
        assert first is again
        assert first.key == "a" * 64 != other.key


async def test_the_least_recently_used_goes_when_room_is_needed() -> None:
    async with toy_encoder(tokens=10, **NEVER_HELD) as toy:
        a, b = await encoded(toy, 5, "a"), await encoded(toy, 5, "b")
        await encoded(toy, 5, "a")
        c = await encoded(toy, 5, "c")
        assert c.offset == b.offset
        assert (await toy.fetch(a.value.where, a.nbytes)).equal(embedding(5, "a"))
        assert (await toy.fetch(c.value.where, c.nbytes)).equal(embedding(5, "c"))
        with pytest.raises(GoneError):
            await toy.fetch(b.value.where, b.nbytes)
        again = await encoded(toy, 5, "b")
        assert (await toy.fetch(again.value.where, again.nbytes)).equal(embedding(5, "b"))
        toy.check()


async def test_handles_are_held_for_their_readers_and_a_full_arena_says_which_flag_to_raise() -> None:
    async with toy_encoder(tokens=10) as toy:
        await encoded(toy, 5, "a")
        await encoded(toy, 5, "b")
        with pytest.raises(Overloaded, match=r"--cache-bytes.*--handle-ttl") as caught:
            await toy.encoder.encode(item(1, "c"))
        assert (caught.value.status, caught.value.retryable, caught.value.code) == (503, True, "cache_full")
        assert await encoded(toy, 5, "a"), "what is cached is served all the same"
        toy.check()


async def test_a_handle_that_was_read_is_held_no_longer() -> None:
    async with toy_encoder(tokens=10) as toy:
        a = await encoded(toy, 5, "a")
        await encoded(toy, 5, "b")
        await toy.fetch(a.value.where, a.nbytes)
        await until(lambda: not a.unread)
        c = await encoded(toy, 5, "c")
        assert c.offset == a.offset
        toy.check()


async def test_a_pinned_entry_outlives_its_hold() -> None:
    async with toy_encoder(tokens=10, **NEVER_HELD) as toy:
        pinned = await toy.encoder.encode(item(6, "a"))
        with pytest.raises(Overloaded):
            await toy.encoder.encode(item(6, "b"))
        toy.encoder.release(pinned)
        assert await encoded(toy, 6, "b")


async def test_what_can_never_fit_is_no_503() -> None:
    async with toy_encoder(tokens=10) as toy:
        with pytest.raises(TooLarge, match="--cache-bytes"):
            await toy.encoder.encode(item(11))
        toy.check()


async def test_a_slow_reader_delays_reuse_of_its_bytes_and_nothing_else() -> None:
    async with toy_encoder(tokens=10, **NEVER_HELD) as toy:
        old = await encoded(toy, 10, "old")
        reading, go_on = threading.Event(), threading.Event()

        def slowly(_moves: Any) -> None:
            reading.set()
            assert go_on.wait(30)

        toy.transfer.plane.script = slowly  # type: ignore[attr-defined]
        reader = asyncio.create_task(toy.fetch(old.value.where, old.nbytes))
        assert await asyncio.to_thread(reading.wait, 30)
        new = asyncio.create_task(toy.encoder.encode(item(10, "new")))
        await until(lambda: toy.encoder.cache_info()["leaving"] == 1)
        assert not new.done()
        go_on.set()
        assert (await reader).equal(embedding(10, "old"))
        entry = await new
        toy.transfer.plane.script = None  # type: ignore[attr-defined]
        assert (await toy.fetch(entry.value.where, entry.nbytes)).equal(embedding(10, "new"))


async def test_broken_media_leave_nothing_behind() -> None:
    async with toy_encoder() as toy:
        with pytest.raises(BadRequest, match="cannot be decoded"):
            await toy.encoder.encode(item(3, "broken"))
        assert toy.encoder.cache_info()["bytes"] == 0
        toy.check()


async def test_a_client_that_leaves_before_the_model_begins_takes_its_item_along() -> None:
    async with toy_encoder(max_batch_patches=1) as toy:
        toy.model.gate.clear()
        first = asyncio.create_task(toy.encoder.encode(item(1, "first")))
        await asyncio.to_thread(toy.model.entered.acquire)
        leaver = asyncio.create_task(toy.encoder.encode(item(1, "leaver")))
        await until(lambda: toy.encoder.queue()["waiting"] == 1)
        leaver.cancel()
        await until(lambda: toy.encoder.queue()["waiting"] == 0)
        toy.model.gate.set()
        await first
        assert toy.model.items == 1
        assert toy.encoder.cache_info()["items"] == 1
        toy.check()


async def test_what_the_model_has_begun_is_kept_for_the_next_who_asks() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        leaver = asyncio.create_task(toy.encoder.encode(item(3)))
        await asyncio.to_thread(toy.model.entered.acquire)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert toy.encoder.cache_info()["filling"] == 1, "the model still writes there"
        toy.model.gate.set()
        await until(lambda: toy.encoder.queue()["items"] == 0)
        await encoded(toy, 3, "cat")
        assert toy.model.items == 1
        toy.check()


async def test_a_full_queue_says_so() -> None:
    async with toy_encoder(max_queue_items=1) as toy:
        toy.model.gate.clear()
        first = asyncio.create_task(toy.encoder.encode(item(1, "a")))
        await asyncio.to_thread(toy.model.entered.acquire)
        with pytest.raises(Overloaded, match="--max-queue-items") as caught:
            await toy.encoder.encode(item(1, "b"))
        assert caught.value.code == "queue_full"
        joined = asyncio.create_task(toy.encoder.encode(item(1, "a")))
        toy.model.gate.set()
        assert await first is await joined


async def test_an_embedding_that_cannot_be_published_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with toy_encoder() as toy:

        async def full(*_args: Any, **_kwargs: Any) -> dict[str, Any]:
            raise TransferError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(toy.transfer, "publish", full)
            with pytest.raises(EngineError, match="the disk is full") as caught:
                await toy.encoder.encode(item(3))
        assert (caught.value.code, caught.value.retryable) == ("publish_failed", True)
        toy.check()
        assert await encoded(toy, 3, "cat")


async def test_a_file_that_somebody_removed_is_written_again_without_encoding_again(tmp_path: Path) -> None:
    async with toy_encoder(transport="storage", folder=tmp_path) as toy:
        entry = await encoded(toy, 3, "cat")
        file = tmp_path / entry.key / "encoder_cache.safetensors"
        file.unlink()
        assert await encoded(toy, 3, "cat") is entry
        assert (await toy.fetch(entry.value.where, entry.nbytes)).equal(embedding(3, "cat"))
        assert toy.model.items == 1
        file.unlink()
        file.parent.rmdir()
        file.parent.touch()
        with pytest.raises(EngineError, match="cannot write") as caught:
            await toy.encoder.encode(item(3, "cat"))
        assert (caught.value.code, caught.value.retryable) == ("publish_failed", True)
        toy.check()


async def test_closing_leaves_no_flight_behind() -> None:
    async with toy_encoder() as toy:
        toy.model.gate.clear()
        begun = asyncio.create_task(toy.encoder.encode(item(3)))
        await asyncio.to_thread(toy.model.entered.acquire)
        threading.Timer(0.05, toy.model.gate.set).start()
    assert (await begun).value.tokens == 3
    assert toy.transfer.audit()["publications"] == 0


async def test_many_items_at_once_keep_the_arena_straight() -> None:
    async with toy_encoder(tokens=64, **NEVER_HELD) as toy:
        few = asyncio.Semaphore(4)  # 4 · 7 tokens in use leave a hole of 7 however they lie

        async def one(n: int) -> None:
            async with few:
                entry = await toy.encoder.encode(item(1 + n % 7, f"seed {n % 20}"))
                view = toy.encoder._bytes[entry.offset : entry.offset + entry.nbytes].view(toy.model.dtype)
                assert view.view(-1, 16).equal(embedding(1 + n % 7, f"seed {n % 20}"))
                toy.encoder.named(entry)
                toy.encoder.release(entry)

        async with asyncio.TaskGroup() as group:
            for n in range(200):
                group.create_task(one(n))
        toy.check()
        assert toy.encoder.cache_info()["bytes"] <= 64 * TOKEN_BYTES


async def test_an_evicted_item_is_published_anew_while_its_old_bytes_are_still_read() -> None:
    async with toy_encoder(tokens=10, **NEVER_HELD) as toy:
        old = await encoded(toy, 5, "cat")
        reading, go_on = threading.Event(), threading.Event()

        def slowly(_moves: Any) -> None:
            reading.set()
            assert go_on.wait(30)

        toy.transfer.plane.script = slowly  # type: ignore[attr-defined]
        reader = asyncio.create_task(toy.fetch(old.value.where, old.nbytes))
        assert await asyncio.to_thread(reading.wait, 30)
        assert toy.encoder._evict()
        new = await encoded(toy, 5, "cat")
        assert new.offset != old.offset
        go_on.set()
        assert (await reader).equal(embedding(5, "cat"))
        toy.transfer.plane.script = None  # type: ignore[attr-defined]
        assert (await toy.fetch(new.value.where, new.nbytes)).equal(embedding(5, "cat"))
        await until(lambda: toy.encoder.cache_info()["leaving"] == 0)
        toy.check()


# ---- with an embedding store


class Shelf:
    """An EmbeddingStore in memory. What is kept is there as soon as it is not `late`."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Record] = {}
        self.kept: list[tuple[str, str, bytes, memoryview, Callable[[], bool]]] = []
        self.late = False

    @asynccontextmanager
    async def found(self, mm_hash: str, dtype: str) -> AsyncIterator[Record | None]:
        await asyncio.sleep(0)
        yield self.records.get((mm_hash, dtype))

    def keep(self, mm_hash: str, dtype: str, meta: bytes, rows: memoryview, valid: Callable[[], bool]) -> None:
        self.kept.append((mm_hash, dtype, meta, rows, valid))
        if not self.late:
            self.write()

    def write(self) -> None:
        for mm_hash, dtype, meta, rows, valid in self.kept:
            copy = memoryview(bytes(rows))
            if valid():
                self.records[mm_hash, dtype] = Record(meta, copy)
        self.kept.clear()


@pytest.mark.parametrize("transport", ["memory", "storage"])
async def test_what_another_encoder_put_into_the_store_is_neither_fetched_nor_computed(
    transport: str, tmp_path: Path
) -> None:
    shelf, named = Shelf(), {"uuid": "a" * 64}
    folder = tmp_path if transport == "storage" else None
    async with toy_encoder(transport=transport, folder=folder, store=shelf) as first:
        made = await first.encoder.encode(item(5, "cat", **named))
    if folder is not None:
        folder = tmp_path / "another"
    async with toy_encoder(transport=transport, folder=folder, store=shelf) as second:
        places: list[Entry] = []
        found = await second.encoder.encode(item(5, "broken", **named), lambda entry, _: places.append(entry))
        assert second.model.items == 0
        assert places == [found]
        assert replace(found.value, where={}) == replace(made.value, where={})
        assert (await second.fetch(found.value.where, found.nbytes)).equal(embedding(5, "cat"))
        second.encoder.release(found)
        assert await second.encoder.encode(item(5, "broken", **named)) is found, "it is in the cache now"
        second.check()


async def test_a_video_out_of_the_store_still_knows_when_its_frames_are() -> None:
    shelf, film = Shelf(), {"uuid": "a" * 64, "modality": "video"}
    async with toy_encoder(store=shelf) as first:
        made = await first.encoder.encode(item(4, "film", **film))
    async with toy_encoder(store=shelf) as second:
        found = await second.encoder.encode(item(4, "broken", **film))
    assert found.value.clip == made.value.clip is not None
    assert found.value.metadata == made.value.metadata


@pytest.mark.parametrize(
    ("meta", "rows"),
    [
        (b"not json", bytes(5 * TOKEN_BYTES)),
        (b'{"tokens": 5}', bytes(5 * TOKEN_BYTES)),
        (None, bytes(4 * TOKEN_BYTES)),
        (None, bytes(0)),
    ],
)
async def test_a_record_that_this_model_cannot_have_made_is_computed_instead(meta: bytes | None, rows: bytes) -> None:
    shelf = Shelf()
    async with toy_encoder(store=shelf, **NEVER_HELD) as toy:
        entry = await encoded(toy, 5, "cat")
        ((where, record),) = shelf.records.items()
        shelf.records[where] = Record(record.meta if meta is None else meta, memoryview(rows))
        assert toy.encoder._evict()
        await until(lambda: toy.encoder.cache_info()["leaving"] == 0)
        again = await encoded(toy, 5, "cat")
        assert again is not entry
        assert (await toy.fetch(again.value.where, again.nbytes)).equal(embedding(5, "cat"))
        toy.check()


async def test_an_embedding_that_has_left_before_its_turn_is_not_put_there() -> None:
    shelf = Shelf()
    async with toy_encoder(tokens=10, store=shelf, **NEVER_HELD) as toy:
        shelf.late = True
        await encoded(toy, 6, "gone")
        last = await encoded(toy, 6, "here")
        shelf.write()
        assert [bytes(record.rows) for record in shelf.records.values()] == [embedding(6, "here").numpy().tobytes()]
        assert list(shelf.records) == [(last.key, "float32")]


async def test_a_full_arena_is_said_of_what_the_store_has_too() -> None:
    shelf = Shelf()
    async with toy_encoder(tokens=10, store=shelf) as toy:
        await encoded(toy, 6, "a")
    async with toy_encoder(tokens=10, store=shelf) as toy:
        pinned = await toy.encoder.encode(item(6, "b"))
        with pytest.raises(Overloaded):
            await toy.encoder.encode(item(6, "a"))
        toy.encoder.release(pinned)
        toy.check()
