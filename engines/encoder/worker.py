"""Runs the model on its own thread, batch after batch, and hands results back to the loop. It chooses nothing:
see `batch`.

While one batch computes, the next one gathers. An item whose coroutine is cancelled before its batch is taken
leaves the queue; later it is computed to the end, because the model already writes its memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from engines.encoder.batch import Batcher
from engines.errors import EngineError

log = logging.getLogger(__name__)


class Item(Protocol):
    @property
    def patches(self) -> int: ...


class Encode(Protocol):
    """Writes the embedding of each item to its output. Called on the model thread."""

    def __call__(self, batch: Sequence[Any], outputs: Sequence[Any], /) -> None: ...


Observe = Callable[[int, int, float], None]
"""Told of each forward: items, patches, seconds. Called on the loop."""


@dataclass(slots=True, eq=False)
class Job:
    item: Item
    output: Any
    done: asyncio.Future[None]
    taken: Callable[[], None]


class ModelThread:
    """One model, one thread, one queue. Use as an async context manager."""

    def __init__(self, encode: Encode, batcher: Batcher[Job], observe: Observe = lambda *_: None) -> None:
        self._encode = encode
        self._batcher = batcher
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._work = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._closing = False
        self._pump: asyncio.Task[None] | None = None
        self.running = 0

    async def __aenter__(self) -> ModelThread:
        self._pump = asyncio.create_task(self._run())  # noqa: TID251 - owned here, awaited in __aexit__
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends after the batch that computes now; what waits is cancelled."""
        assert self._pump is not None
        self._closing = True
        self._work.set()
        await self._pump
        while batch := self._batcher.take():
            for job in batch:
                job.done.cancel()
        self._thread.shutdown(wait=True)

    @property
    def waiting(self) -> int:
        return len(self._batcher)

    @property
    def patches(self) -> int:
        return self._batcher.patches

    async def room(self) -> None:
        """Until less than two batches wait: whoever prepares items pauses here, so that pixels do not pile up."""
        await self._roomy.wait()

    async def encode(self, item: Item, output: Any, taken: Callable[[], None]) -> None:
        """Compute one item into `output`. `taken()` is called when its batch starts; until then it may be cancelled.

        Raises EngineError when the model failed on this item alone.
        """
        job = Job(item, output, asyncio.get_running_loop().create_future(), taken)
        self._batcher.add(job, item.patches)
        self._queue_changed()
        self._work.set()
        try:
            await job.done
        finally:
            if self._batcher.discard(job):
                self._queue_changed()

    def _queue_changed(self) -> None:
        if self._batcher.patches < 2 * self._batcher.budget:
            self._roomy.set()
        else:
            self._roomy.clear()

    async def _run(self) -> None:
        while not self._closing:
            await self._work.wait()
            self._work.clear()
            while not self._closing and (batch := self._batcher.take()):
                self._queue_changed()
                # A cancelled future belongs to a coroutine that has not run since: its memory may go at any moment.
                await self._compute([job for job in batch if not job.done.done()])

    async def _compute(self, batch: list[Job]) -> None:
        if not batch:
            return
        for job in batch:
            job.taken()
        self.running = len(batch)
        loop = asyncio.get_running_loop()
        errors, seconds = await loop.run_in_executor(self._thread, self._forward, batch)
        self.running = 0
        self._observe(len(batch), sum(job.item.patches for job in batch), seconds)
        for job, error in zip(batch, errors, strict=True):
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)

    def _forward(self, batch: list[Job]) -> tuple[list[EngineError | None], float]:
        """On the model thread: one error or None per job. A batch that fails is tried again one by one."""
        started = time.monotonic()
        error = self._try(batch)
        errors = [error] if len(batch) == 1 or error is None else [self._try([job]) for job in batch]
        if error is None:
            errors = [None] * len(batch)
        return errors, time.monotonic() - started

    def _try(self, batch: list[Job]) -> EngineError | None:
        try:
            self._encode([job.item for job in batch], [job.output for job in batch])
        except Exception as error:  # the edge of the model thread: the items fail, the thread goes on
            log.exception("a forward over %d items failed", len(batch))
            return EngineError(f"the vision model failed on this item: {error}", code="encode_failed")
        return None
