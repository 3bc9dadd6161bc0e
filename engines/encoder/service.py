"""Takes items to embeddings that other engines can fetch. No HTTP, no pixels, no bytes on any wire: it puts the
parts in order.

    find in cache ─ hit ─▶ pin
          └─ miss ─ join a flight, or start one:
                    look in the store ─ hit ▸ reserve ▸ copy ▸ publish ─▶ pin
                    fetch ▸ decode (pool) ▸ reserve in the arena ▸ promise ▸ forward (model thread) ▸ fulfil ─▶ pin

A handle is good from the promise on: who fetches waits for the forward. In a folder nothing can be promised: there an
embedding is published after its forward. The model writes an embedding once, into the arena it is published from. A
pinned entry stays until `release`; one that an answer named stays until it is read, for --handle-ttl seconds at most.
What is only cached goes when room is needed, least recently used first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import msgspec
import torch
from blake3 import blake3

from engines.encoder.batch import Batcher
from engines.encoder.cache import EmbeddingCache, Entry, State
from engines.encoder.cutting import Prepared
from engines.encoder.fetch import Fetcher
from engines.encoder.flights import Flight, Flights
from engines.encoder.media import MediaPool
from engines.encoder.metrics import Metrics
from engines.encoder.request import Embedding, MediaItem
from engines.encoder.worker import Encode, ModelThreads
from engines.errors import EngineError, Overloaded, PeerFailed, TooLarge
from engines.settings import EncoderSettings
from engines.store.records import Record
from engines.store.store import EmbeddingStore
from engines.transfer.base import Arena, Transfer, TransferError

log = logging.getLogger(__name__)

LANDING = 1.0
"""Seconds for which an embedding that has just been written is kept for those who wait for it."""

Placed = Callable[[Entry, bool], None]
"""Told, for one item, where its embedding is or will be, and whether it was there already."""


class Reader(Protocol):
    """Bytes to patches; called on pool threads. See `media.MediaReader`."""

    def read(self, data: bytes, item: MediaItem) -> Prepared: ...


class Model(Protocol):
    """Patches to embeddings, on one device or several. See `model.VisionModel`, `model.Replicas`."""

    width: int
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str: ...
    @property
    def encodes(self) -> Sequence[Encode]: ...
    @property
    def depth(self) -> int: ...
    def nbytes(self, tokens: int) -> int: ...
    def stage(self, item: Prepared, /) -> Prepared: ...


async def _gone(key: str) -> Entry:
    raise PeerFailed(f"the embedding of {key} is lost: it was evicted", stage="encode", code="embedding_gone")


@contextmanager
def publishing() -> Iterator[None]:
    try:
        yield
    except (TransferError, OSError) as error:
        raise EngineError(f"cannot publish the embedding: {error}", code="publish_failed", retryable=True) from error


class Encoder:
    """One model, one cache, one transfer. Made by `running`."""

    def __init__(
        self,
        settings: EncoderSettings,
        model: Model,
        reader: Reader,
        transfer: Transfer,
        arena: Arena,
        metrics: Metrics,
        store: EmbeddingStore | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.metrics = metrics
        self.cache = EmbeddingCache(arena.nbytes)
        self._model = model
        self._reader = reader
        self._transfer = transfer
        self._arena = arena
        self._bytes = torch.frombuffer(arena.buffer, dtype=torch.uint8)
        self._pool = MediaPool(settings.media_threads, settings.decode_timeout)
        self._slots = asyncio.Semaphore(settings.media_threads)
        self._fetcher = Fetcher(settings, self._pool.run)
        self._flights: Flights[Entry] = Flights()
        self._threads = ModelThreads(model.encodes, Batcher(settings.max_batch_patches), metrics.forward, model.depth)
        self._freed = asyncio.Event()
        metrics.watch(self.queue, self.cache_info)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Encoder]:
        """Serve until the block ends; then no thread and no flight of ours is left."""
        async with AsyncExitStack() as stack:
            stack.callback(self._forget_arena)
            stack.callback(self._pool.close)
            await stack.enter_async_context(self._threads)
            stack.push_async_callback(self._fetcher.close)
            stack.push_async_callback(self._flights.close)
            yield self

    def _forget_arena(self) -> None:
        del self._bytes  # or its memory could not be unmapped

    def queue(self) -> dict[str, int]:
        """Items in flight, and of these: waiting for the model, in it; patches that wait."""
        threads = self._threads
        return {
            "items": len(self._flights),
            "waiting": threads.waiting,
            "running": threads.running,
            "patches": threads.patches,
        }

    def cache_info(self) -> dict[str, int]:
        return self.cache.info(time.monotonic())

    async def encode(self, item: MediaItem, placed: Placed = lambda entry, cached: None) -> Entry:
        """The item's entry, pinned: the caller ends with `release`. Its `value` is an Embedding.

        `placed` is called before this returns, and where the transfer can promise embeddings before the model has run.
        Raises EngineError. Cancelled: the work ends too, unless others wait for it or the model has begun it.
        """
        started = time.monotonic()
        data = None
        if item.uuid is None:
            data = await self._fetch(item)
            content = data
            digest = await self._pool.run(lambda: blake3(content).hexdigest())
        key = item.key(item.uuid or digest)
        while True:
            entry = await self._find(key, item, data, placed)
            if self.cache.pin(entry):  # else it was evicted between the flight's end and our turn
                self.metrics.item.observe(time.monotonic() - started)
                return entry

    def is_at(self, key: str, where: object) -> bool:
        """Whether an answer of ours said so of an embedding that is cached, or is being written."""
        entry = self.cache.find(key) or self._flights.told(key)
        return entry is not None and entry.value.where == where

    async def held(self, key: str) -> Entry:
        """The entry of such an embedding once it is written, pinned. Raises EngineError."""
        while (entry := self.cache.find(key)) is None:
            await self._flights.join(key, lambda _: _gone(key))
        self.cache.pin(entry)
        return entry

    def named(self, entry: Entry) -> None:
        """An answer names the entry, whose handle stays good until it is read, for --handle-ttl at most."""
        if not self._transfer.durable:
            self.cache.named(entry, time.monotonic() + self.settings.handle_ttl)

    def release(self, entry: Entry) -> None:
        """Undo `encode`'s pin."""
        self.cache.unpin(entry)

    def read(self, entry: Entry) -> bytes:
        """The rows of an entry that the caller has pinned, as a copy: nobody need fetch them on its account."""
        self.cache.not_named(entry)
        return bytes(self._arena.buffer[entry.offset : entry.offset + entry.nbytes])

    def rows(self, entry: Entry) -> torch.Tensor:
        """The same where they lie, [tokens, width], good as long as the pin."""
        self.cache.not_named(entry)
        return self._on_arena(entry)

    async def _find(self, key: str, item: MediaItem, data: bytes | None, placed: Placed) -> Entry:
        if (entry := self.cache.find(key)) is not None:
            self.metrics.cache("hit")
            with publishing():
                await self._transfer.restore(key)
            placed(entry, True)
            return entry
        joined = key in self._flights
        if not joined and len(self._flights) >= self.settings.max_queue_items:
            limit = f"--max-queue-items {self.settings.max_queue_items}"
            raise Overloaded(f"{len(self._flights)} items are in the queue already ({limit})", code="queue_full")
        self.metrics.cache("joined" if joined else "miss")
        work = partial(self._produce, key=key, item=item, data=data)
        return await self._flights.join(key, work, lambda entry: placed(entry, False))

    async def _produce(self, flight: Flight[Entry], key: str, item: MediaItem, data: bytes | None) -> Entry:
        if (recalled := await self._recall(flight, key)) is not None:
            return recalled
        prepared = await self._prepare(await self._fetch(item) if data is None else data, item)
        outline = self._outline(prepared)
        entry = await self._reserve(key, self._model.nbytes(prepared.tokens), outline)
        try:
            if self._transfer.durable:
                await self._compute(flight, entry, prepared)
                entry.value = await self._publish(entry, outline)
                flight.tell(entry)
            else:
                entry.value = await self._publish(entry, outline, promised=True)
                flight.tell(entry)
                await self._compute(flight, entry, prepared)
        except BaseException:
            self._transfer.withdraw(key)
            self.cache.abandon(entry)
            raise
        self._commit(flight, entry)
        if not self._transfer.durable:
            self._transfer.fulfil(key)
        self._remember(entry)
        return entry

    async def _recall(self, flight: Flight[Entry], key: str) -> Entry | None:
        """The entry of an embedding that another encoder put into the store; None when there is none."""
        if self.store is None:
            return None
        async with self.store.found(key, self._model.dtype_name) as record:
            if record is None or (outline := self._described(record)) is None:
                return None
            entry = await self._reserve(key, len(record.rows), outline)
            try:
                flight.commit()  # a thread writes its memory from here on
                await asyncio.to_thread(self._fill, entry, record.rows)
                entry.value = await self._publish(entry, outline)
            except BaseException:
                self._transfer.withdraw(key)
                self.cache.abandon(entry)
                raise
        flight.tell(entry)
        self._commit(flight, entry)
        return entry

    def _commit(self, flight: Flight[Entry], entry: Entry) -> None:
        """Those who wait for it pin it now, and their answers hold it longer; if all have left, its room may go."""
        landing = min(LANDING, self.settings.handle_ttl) if flight.waiters else 0.0
        self.cache.commit(entry, entry.value, time.monotonic() + landing)

    def _described(self, record: Record) -> Embedding | None:
        """What its writer said of it, without a place; None when that is not what this model makes."""
        try:
            outline = msgspec.json.decode(record.meta, type=Embedding)
        except msgspec.DecodeError:
            return None
        fits = outline.shape == (outline.tokens, self._model.width)
        return outline if fits and len(record.rows) == self._model.nbytes(outline.tokens) else None

    def _fill(self, entry: Entry, rows: memoryview) -> None:
        self._arena.buffer[entry.offset : entry.offset + entry.nbytes] = rows

    def _remember(self, entry: Entry) -> None:
        """Let the store have it, if it is still there when its turn comes."""
        if self.store is not None:
            rows = self._arena.buffer[entry.offset : entry.offset + entry.nbytes]
            meta = msgspec.json.encode(replace(entry.value, where={}))
            self.store.keep(entry.key, self._model.dtype_name, meta, rows, lambda: entry.state is State.READY)

    async def _fetch(self, item: MediaItem) -> bytes:
        started = time.monotonic()
        data = await self._fetcher.fetch(item.url, item.modality)
        self.metrics.stage("fetch", time.monotonic() - started)
        return data

    async def _prepare(self, data: bytes, item: MediaItem) -> Prepared:
        async with self._slots:  # as many as there are threads: the others wait as files, which are smaller than pixels
            await self._threads.room()
            started = time.monotonic()
            prepared = await self._pool.run(lambda: self._model.stage(self._reader.read(data, item)), item.modality)
        self.metrics.stage("decode", time.monotonic() - started)
        return prepared

    async def _compute(self, flight: Flight[Entry], entry: Entry, prepared: Prepared) -> None:
        """From the moment the model begins, the flight is not cancelled any more."""
        started = time.monotonic()
        await self._threads.encode(prepared, self._on_arena(entry), flight.commit)
        self.metrics.stage("forward", time.monotonic() - started)

    def _on_arena(self, entry: Entry) -> torch.Tensor:
        data = self._bytes[entry.offset : entry.offset + entry.nbytes]
        return data.view(self._model.dtype).view(-1, self._model.width)

    def _outline(self, prepared: Prepared) -> Embedding:
        """Without a place."""
        shape = (prepared.tokens, self._model.width)
        return Embedding(prepared.grid, prepared.tokens, self._model.dtype_name, shape, {}, prepared.clip)

    async def _publish(self, entry: Entry, outline: Embedding, promised: bool = False) -> Embedding:
        started = time.monotonic()
        with publishing():
            where = await self._transfer.publish(
                entry.key,
                self._arena,
                [(entry.offset, entry.nbytes)],
                ttl=None,
                dtype=outline.dtype,
                shape=outline.shape,
                on_free=lambda: self._on_free(entry),
                on_read=lambda: self.cache.was_read(entry),
                promised=promised,
            )
        self.metrics.stage("publish", time.monotonic() - started)
        return replace(outline, where=where)

    # ---- room in the arena

    async def _reserve(self, key: str, nbytes: int, outline: Embedding) -> Entry:
        if not self.cache.fits(nbytes):
            limit = f"--cache-bytes {self.settings.cache_bytes}"
            told = f"{outline.tokens} embeddings are {nbytes} bytes: more than {limit}"
            raise TooLarge(told, code=f"{outline.modality}_too_large")
        while (entry := self.cache.reserve(key, nbytes)) is None:
            if self.cache.settling(nbytes, time.monotonic()):
                await self._wait_for_room()
            elif not self._evict():
                raise self._no_room()
        return entry

    def _evict(self) -> bool:
        victim = self.cache.evict(time.monotonic())
        if victim is None:
            return False
        self.metrics.evicted.inc()
        self._transfer.withdraw(victim.key)  # calls _on_free, now or when its last reader is done
        return True

    async def _wait_for_room(self) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout(0.1):
                await self._freed.wait()
        except TimeoutError:
            pass  # the readers are slow: the caller looks again, and evicts others once they count as stopped

    def _on_free(self, entry: Entry) -> None:
        if entry.state is State.LEAVING:  # else: the transfer closes, and everything with it
            self.cache.freed(entry)
            self._freed.set()

    def _no_room(self) -> Overloaded:
        info = self.cache_info()
        held = f"{info['pinned']} embeddings are held for their readers, {info['filling']} are being written"
        advice = "raise --cache-bytes, lower --handle-ttl, or send less at once"
        return Overloaded(f"no room for the embedding: {held}; {advice}", code="cache_full")
