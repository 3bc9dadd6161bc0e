"""Runs the model, batch after batch, on threads of its own, and hands results back to the loop. It chooses nothing of
what shares a batch: see `batch`.

While batches compute, the next one gathers. An item whose coroutine is cancelled before its batch is taken leaves the
queue; later it is computed to the end, because the model already writes its memory.

    one queue ─┬─▶ device 0: `depth` threads      a batch goes to the device that computes the fewest
               └─▶ device 1: …                    what waits is shared out over those that compute none

What one device fails on, another tries. If that can, the first gets no batch while there is a choice: a broken device
fails fast, and would take everything.
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
    """Writes the embedding of each item to its output. Called on its device's threads, `depth` at a time."""

    def __call__(self, batch: Sequence[Any], outputs: Sequence[Any], /) -> None: ...


Observe = Callable[[int, int, float], None]
"""Told of each forward: items, patches, seconds. Called on the loop."""


@dataclass(slots=True, eq=False)
class Job:
    item: Item
    output: Any
    done: asyncio.Future[None]
    taken: Callable[[], None]


@dataclass(slots=True, eq=False)
class Worker:
    """One device. `busy`: batches that it computes. `broken`: it failed on all of its last, and another did not."""

    encode: Encode
    threads: ThreadPoolExecutor
    busy: int = 0
    broken: bool = False


class ModelThreads:
    """One model on one device or several, and one queue. Use as an async context manager."""

    def __init__(
        self,
        encodes: Sequence[Encode],
        batcher: Batcher[Job],
        observe: Observe = lambda *_: None,
        depth: int = 1,
    ) -> None:
        """`encodes`: one for each device. `depth`: batches that a device is given at once."""
        self._workers = [
            Worker(encode, ThreadPoolExecutor(depth, thread_name_prefix=f"model-{number}"))
            for number, encode in enumerate(encodes)
        ]
        self._depth = depth
        self._batcher = batcher
        self._observe = observe
        self._work = asyncio.Event()
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._closing = False
        self._pump: asyncio.Task[None] | None = None
        self._batches: set[asyncio.Task[None]] = set()
        self.running = 0

    async def __aenter__(self) -> ModelThreads:
        self._pump = asyncio.create_task(self._run())  # noqa: TID251 - owned here, awaited in __aexit__
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends after the batches that compute now; what waits is cancelled."""
        assert self._pump is not None
        self._closing = True
        self._work.set()
        await self._pump
        await asyncio.gather(*self._batches)
        while batch := self._batcher.take():
            for job in batch:
                job.done.cancel()
        for worker in self._workers:
            worker.threads.shutdown(wait=True)

    @property
    def waiting(self) -> int:
        return len(self._batcher)

    @property
    def patches(self) -> int:
        return self._batcher.patches

    async def room(self) -> None:
        """Until less than two batches for each device wait: whoever prepares items pauses here, so that pixels do not
        pile up."""
        await self._roomy.wait()

    async def encode(self, item: Item, output: Any, taken: Callable[[], None]) -> None:
        """Compute one item into `output`. `taken()` is called when its batch starts; until then it may be cancelled.

        Raises EngineError when the model failed on this item alone, on two devices where there are.
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
        if self._batcher.patches < 2 * self._batcher.budget * len(self._workers):
            self._roomy.set()
        else:
            self._roomy.clear()

    async def _run(self) -> None:
        while not self._closing:
            await self._work.wait()
            self._work.clear()
            while not self._closing and (worker := self._free()) and (batch := self._batcher.take(self._idle())):
                self._queue_changed()
                # A cancelled future belongs to a coroutine that has not run since: its memory may go at any moment.
                self._start(worker, [job for job in batch if not job.done.done()])

    def _free(self) -> Worker | None:
        """Whoever computes least of those that may compute more."""
        return min((worker for worker in self._workers if worker.busy < self._depth), key=_preference, default=None)

    def _idle(self) -> int:
        """Among how many devices what waits is to be shared out."""
        return max(1, sum(not (worker.busy or worker.broken) for worker in self._workers))

    def _start(self, worker: Worker, batch: list[Job]) -> None:
        if not batch:
            return
        for job in batch:
            job.taken()
        worker.busy += 1
        self.running += len(batch)
        task = asyncio.create_task(self._compute(worker, batch))  # noqa: TID251 - awaited in __aexit__
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)

    async def _compute(self, worker: Worker, batch: list[Job]) -> None:
        found = dict(zip(batch, await self._on(worker, batch), strict=True))
        failed = [job for job, error in found.items() if error is not None]
        worker.broken = len(failed) == len(batch) and len(self._workers) > 1
        if failed and (others := [other for other in self._workers if other is not worker]):
            other = min(others, key=_preference)
            other.busy += 1
            again = await self._on(other, failed)
            worker.broken = worker.broken and None in again
            found.update(zip(failed, again, strict=True))
        self.running -= len(batch)
        for job, error in found.items():
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)

    async def _on(self, worker: Worker, batch: list[Job]) -> list[EngineError | None]:
        """One error or None per job. The worker counts as busy already."""
        loop = asyncio.get_running_loop()
        errors, seconds = await loop.run_in_executor(worker.threads, _forward, worker.encode, batch)
        worker.busy -= 1
        self._work.set()
        self._observe(len(batch), sum(job.item.patches for job in batch), seconds)
        return errors


def _preference(worker: Worker) -> tuple[bool, int]:
    return worker.broken, worker.busy


def _forward(encode: Encode, batch: list[Job]) -> tuple[list[EngineError | None], float]:
    """On a model thread: one error or None per job. A batch that fails is tried again one by one."""
    started = time.monotonic()
    error = _try(encode, batch)
    errors = [error] if len(batch) == 1 or error is None else [_try(encode, [job]) for job in batch]
    if error is None:
        errors = [None] * len(batch)
    return errors, time.monotonic() - started


def _try(encode: Encode, batch: list[Job]) -> EngineError | None:
    try:
        encode([job.item for job in batch], [job.output for job in batch])
    except Exception as error:  # the edge of the model threads: the items fail, the thread goes on
        log.exception("a forward over %d items failed", len(batch))
        return EngineError(f"the vision model failed on this item: {error}", code="encode_failed")
    return None
