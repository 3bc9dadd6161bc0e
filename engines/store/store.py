"""An engine's view of the embedding store: look for rows, put rows there. What it is not told of in time is a miss.

Looking costs a request at most --embedding-store-timeout, and it costs nobody while an earlier call is late: a store
that does not answer is not asked. Writing costs nothing: rows are copied after the answer, one embedding at a
time, and only as long as they are still there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from engines.errors import SetupError
from engines.settings import EngineSettings
from engines.store import records
from engines.store.link import Client, Link, StoreLost
from engines.store.metrics import Lookup, Metrics, WriteResult
from engines.store.records import BadRecord, Record
from engines.weights import WeightsError

log = logging.getLogger(__name__)

WRITE_PACE = 100 << 20
"""Bytes per second that a write may take its time at, as nobody waits for it."""
LONGEST_QUEUE = 64
"""Embeddings that wait to be written; what comes on top is left out."""


@dataclass(frozen=True, slots=True)
class _Write:
    key: str
    meta: bytes
    rows: memoryview
    valid: Callable[[], bool]


class EmbeddingStore:
    """Of one model. Made by `opened`. `timeout`: seconds for one lookup."""

    def __init__(self, link: Link, fingerprint: str, timeout: float, metrics: Metrics) -> None:
        self._link = link
        self._fingerprint = fingerprint
        self._timeout = timeout
        self._metrics = metrics
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue()
        metrics.connected.set_function(lambda: self._link.client is not None)

    def info(self) -> dict[str, Any]:
        return {"connected": self._link.client is not None, **self._metrics.counts}

    # ---- looking

    @asynccontextmanager
    async def found(self, mm_hash: str, dtype: str) -> AsyncIterator[Record | None]:
        """The embedding's record, whose rows are gone when the block is left; None where there is none to be had."""
        began = time.monotonic()
        with ExitStack() as held:
            result, record = await self._look(held, records.key(self._fingerprint, dtype, mm_hash))
            self._metrics.lookup(result, len(record.rows) if record else 0)
            self._metrics.seconds.observe(time.monotonic() - began)
            yield record

    async def get(self, mm_hash: str, dtype: str, target: memoryview) -> bool:
        """Copy the embedding's rows to `target`, which has their length. False: there are none to be had.

        Cancelled, it may go on writing to `target` for a moment.
        """
        async with self.found(mm_hash, dtype) as record:
            if record is None or len(record.rows) != len(target):
                return False
            await asyncio.to_thread(_copy, record.rows, target)
            return True

    async def _look(self, held: ExitStack, key: str) -> tuple[Lookup, Record | None]:
        """`held` keeps the span that the record's rows are in."""
        client, until = self._link.client, time.monotonic() + self._timeout
        if client is None:
            return "skipped", None
        try:
            nbytes = await client.ask("size", key, self._timeout)
            if nbytes <= 0:
                return "miss", None
            span = held.enter_context(client.span(nbytes))
            if span is None:
                return "skipped", None
            if await client.ask("get", key, until - time.monotonic(), span) != nbytes:
                return "miss", None  # it went in between
            return "hit", await asyncio.to_thread(records.opened, span.view, key)
        except StoreLost as error:
            _say(error)
        except BadRecord as error:
            log.warning("the embedding store holds no record as %s: %s", key, error)
            await self._remove(client, key)
        return "error", None

    async def _remove(self, client: Client, key: str) -> None:
        """As long as it is there, nothing else can be put there."""
        try:
            await client.ask("remove", key, self._timeout)
        except StoreLost as error:
            _say(error)

    # ---- writing

    def keep(self, mm_hash: str, dtype: str, meta: bytes, rows: memoryview, valid: Callable[[], bool]) -> None:
        """Put an embedding there, soon, unless it is no more `valid` once it was copied: `rows` may be another's."""
        if self._link.client is None or self._queue.qsize() >= LONGEST_QUEUE:
            self._metrics.write("skipped")
            return
        self._queue.put_nowait(_Write(records.key(self._fingerprint, dtype, mm_hash), meta, rows, valid))

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[EmbeddingStore]:
        """Within, what is kept is written. On leaving, what waits is left out, and no rows are looked at any more."""
        writer = asyncio.create_task(self._write_all())  # noqa: TID251 - ends below
        try:
            yield self
        finally:
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(None)
            await writer

    async def _write_all(self) -> None:
        while (write := await self._queue.get()) is not None:
            await self._write(write)

    async def _write(self, write: _Write) -> None:
        with ExitStack() as held:
            result = await self._put(held, write)
        self._metrics.write(result, len(write.rows) if result == "written" else 0)

    async def _put(self, held: ExitStack, write: _Write) -> WriteResult:
        client, nbytes = self._link.client, records.size(write.meta, len(write.rows))
        span = None if client is None else held.enter_context(client.span(nbytes))
        if client is None or span is None:
            return "skipped"
        await asyncio.to_thread(records.seal, span.view, write.key, write.meta, write.rows)
        if not write.valid():
            return "skipped"
        try:
            deadline = self._timeout + nbytes / WRITE_PACE
            return "written" if await client.ask("put", write.key, deadline, span) == 0 else "refused"
        except StoreLost as error:
            _say(error)
            return "error"


def _say(error: StoreLost) -> None:
    log.warning("the embedding store is not asked for a while: %s", error)


def _copy(rows: memoryview, target: memoryview) -> None:
    target[:] = rows


@asynccontextmanager
async def opened(settings: EngineSettings, registry: CollectorRegistry) -> AsyncIterator[EmbeddingStore | None]:
    """The store that --embedding-store names; None without it. Raises SetupError, but not where no store answers."""
    if not settings.embedding_store:
        yield None
        return
    try:
        fingerprint = await asyncio.to_thread(records.fingerprint, settings.model)
    except (OSError, ValueError, WeightsError) as error:
        raise SetupError(f"--embedding-store: {settings.model} cannot be told apart from others: {error}") from None
    protocol = "rdma" if settings.rdma else "tcp"
    link = Link(settings.embedding_store, settings.transfer_host, protocol, int(settings.embedding_store_buffer))
    async with link.running():
        store = EmbeddingStore(link, fingerprint, settings.embedding_store_timeout, Metrics(registry))
        async with store.writing():
            yield store
