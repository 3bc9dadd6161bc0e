"""A thread that owns the connector's transfer: it brings embeddings to the shelf while vLLM's scheduler goes on.

It decides nothing: `Arrivals` orders, and takes the reports from `reports`. An order ends in exactly one report unless
it is cancelled first.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from engines.ec_connector.arrivals import Arrivals, Wanted
from engines.ec_connector.options import Options
from engines.ec_connector.publisher import ArenaPublisher, FolderPublisher, Publisher, described
from engines.ec_connector.shelf import Shelf
from engines.errors import EngineError
from engines.language.embeddings import EmbeddingReceiver
from engines.language.sequence import Item
from engines.transfer import create
from engines.transfer.base import Transfer, TransferError

log = logging.getLogger(__name__)

POLL = 0.01
"""Seconds between two looks at a shared folder for a file that somebody is about to write."""
START_TIMEOUT = 30.0


class Courier:
    """`Deliveries` for one engine, and its `publish`. `width`: columns of an embedding of this model."""

    def __init__(self, options: Options, shelf: Shelf, width: int, *, receives: bool, sends: bool) -> None:
        self._options, self._shelf, self._width = options, shelf, width
        self._receives, self._sends = receives, sends
        self._shared = None if options.shared_storage_path is None else Shelf(Path(options.shared_storage_path))
        self.store = self._shared or shelf
        """Where a worker puts what is to be published."""
        self._receiver: EmbeddingReceiver | None = None
        self._publisher: Publisher | None = None
        self._reports: SimpleQueue[Callable[[Arrivals], None]] = SimpleQueue()
        self._orders: dict[str, asyncio.Task[None]] = {}
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="triptych-courier", daemon=True)

    # ---- on the scheduler's thread

    def start(self) -> None:
        """Returns when the transfer is open. Raises TransferError, ValueError."""
        self._thread.start()
        self._started.result(START_TIMEOUT)

    def order(self, wanted: Wanted) -> None:
        self._loop.call_soon_threadsafe(self._take, wanted)

    def cancel(self, key: str) -> None:
        self._loop.call_soon_threadsafe(self._drop, key)

    def discard(self, key: str) -> None:
        self._loop.call_soon_threadsafe(self._shelf.discard, key)

    def report(self, arrivals: Arrivals) -> None:
        """Tell what happened since the last call."""
        while True:
            try:
                self._reports.get_nowait()(arrivals)
            except Empty:
                return

    def published(self, key: str) -> bool:
        """Whether the other engines can fetch it now."""
        return self._publisher is not None and key in self._publisher

    def publish(self, key: str) -> Mapping[str, Any]:
        """Let the other engines fetch what a worker put into `store`; what its entry says of that.

        Empty: it is not there, or there is no room for it.
        """
        if self._publisher is None:
            return {}
        try:
            return asyncio.run_coroutine_threadsafe(self._publisher.publish(key), self._loop).result()
        except (EngineError, TransferError, OSError, ValueError) as error:
            log.warning("cannot publish the embedding %s: %s", key, error)
            return {}

    def close(self) -> None:
        """Ends the transfer and the thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    # ---- on our own

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        options = self._options
        async with AsyncExitStack() as stack:
            transfer = create(
                options.transfer,
                host=options.transfer_host,
                rdma=options.rdma,
                storage_path=options.shared_storage_path,
            )
            stack.push_async_callback(transfer.close)
            if self._receives:
                arena = transfer.allocate("embeddings", options.embedding_bytes)
                self._receiver = EmbeddingReceiver(transfer, arena, self._width, options.transfer_timeout)
            if self._sends:
                self._publisher = self._make_publisher(transfer)
            await transfer.start()
            group = await stack.enter_async_context(asyncio.TaskGroup())
            self._group = group
            self._started.set_result(None)
            await self._stop.wait()
            for task in self._orders.values():
                task.cancel()

    def _make_publisher(self, transfer: Transfer) -> Publisher:
        if self._shared is not None:
            return FolderPublisher(self._shared)
        arena = transfer.allocate("published", self._options.cache_bytes)
        return ArenaPublisher(transfer, arena, self._shelf, self._options.handle_ttl)

    def _take(self, wanted: Wanted) -> None:
        self._drop(wanted.key)
        self._orders[wanted.key] = self._group.create_task(self._deliver(wanted))

    def _drop(self, key: str) -> None:
        task = self._orders.pop(key, None)
        if task is not None:
            task.cancel()

    async def _deliver(self, wanted: Wanted) -> None:
        key = wanted.key
        try:
            async with asyncio.timeout(self._options.wait_timeout):
                nbytes = await self._bring(wanted)
        except Exception as error:  # noqa: BLE001 - the thread's edge: this order has failed, the thread goes on
            reason = str(error) or f"nothing came within {self._options.wait_timeout:g} s"
            log.warning("no embedding %s: %s", key, reason)
            self._reports.put(lambda arrivals: arrivals.failed(key))
        else:
            self._reports.put(lambda arrivals: arrivals.arrived(key, nbytes))
        finally:
            if self._orders.get(key) is asyncio.current_task():
                del self._orders[key]

    async def _bring(self, wanted: Wanted) -> int:
        """Fetch it and put it on the shelf; its size in bytes."""
        assert self._receiver is not None
        entry = wanted.entry
        if self._shared is not None and "where" not in entry:
            entry = await self._awaited(self._shared, wanted)
        item = Item(wanted.key, "image", (1, 1, wanted.tokens), 0, wanted.tokens)
        held = await self._receiver.receive([item], {wanted.key: entry})
        try:
            rows = held.whole(0)
            # not in a thread: whoever is cancelled would release memory that the thread still reads
            self._shelf.put(wanted.key, rows)
            return rows.nbytes
        finally:
            held.release()

    @staticmethod
    async def _awaited(shared: Shelf, wanted: Wanted) -> Mapping[str, Any]:
        """The entry of a file that is in the shared folder, or will be; who can encode instead does not wait for it."""
        path = shared.path(wanted.key)
        while not wanted.encodable and not await asyncio.to_thread(path.exists):  # noqa: ASYNC110 - others write it
            await asyncio.sleep(POLL)
        return await asyncio.to_thread(described, shared, wanted.key)
