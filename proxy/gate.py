"""Waiting to be admitted. Decides nothing: `admission` does; whoever enters leaves, whatever happened."""

from __future__ import annotations

import asyncio

from proxy.admission import Admission, Entry, Place, full
from proxy.errors import QueueTimeout, ShuttingDown
from proxy.metrics import Metrics


class Gate:
    """One for the whole process."""

    def __init__(self, admission: Admission, metrics: Metrics) -> None:
        self.admission = admission
        self._metrics = metrics
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by the entry's number
        self._closed = False

    def close(self) -> None:
        """Nobody new is admitted, and those that wait are refused: the proxy is stopping."""
        self._closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ShuttingDown("the proxy is stopping: send the request again"))

    async def enter(self, priority: int, nbytes: int) -> Entry:
        """A place within the limits, until `leave`. Raises TooLarge, Overloaded, QueueTimeout, ShuttingDown."""
        if self._closed:
            raise ShuttingDown("the proxy is stopping: send the request to another")
        entry, refused = self.admission.arrive(priority, nbytes)
        if refused is not None:
            self._tell(refused)
        if entry.place is Place.WAITING:
            try:
                await self._wait(entry)
            except BaseException:
                self.leave(entry)
                raise
        return entry

    def leave(self, entry: Entry) -> None:
        """Give the place back. Idempotent."""
        for promoted in self.admission.leave(entry):
            future = self._waiting.get(promoted.number)
            if future is not None and not future.done():
                future.set_result(None)

    async def _wait(self, entry: Entry) -> None:
        future = self._waiting[entry.number] = asyncio.get_running_loop().create_future()
        patience = self.admission.limits.patience
        timer = asyncio.timeout(patience)
        try:
            with self._metrics.queued.track_inprogress():
                async with timer:
                    await future
        except TimeoutError:
            if not timer.expired():
                raise
            raise QueueTimeout(f"no place became free within {patience:g} s (--queue-timeout)") from None
        finally:
            del self._waiting[entry.number]

    def _tell(self, refused: Entry) -> None:
        future = self._waiting.get(refused.number)
        if future is not None and not future.done():
            future.set_exception(full(self.admission.waiting))
