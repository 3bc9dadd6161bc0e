"""Waiting to be admitted. Decides nothing: `admission` does; whoever enters leaves, whatever happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

from proxy.core import Job
from proxy.errors import ProxyError, QueueTimeout, ShuttingDown
from proxy.intake import wishes
from proxy.intake.admission import Admission, Entry, Limits, Outlook, Place, Wish, full, late
from proxy.telemetry.metrics import Metrics

_LOOK_S = 0.02  # engines' queues grow shorter without anybody leaving, and other workers' requests leave unseen


@dataclass(frozen=True, slots=True)
class Targets:
    """What every request is to get, in seconds; `rooms`: media wait for room for their embeddings."""

    first: float = inf
    pace: float = inf
    rooms: bool = False


class Gate:
    """One for the whole process."""

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float],
        foresee: Callable[[Job], Outlook],
        targets: Targets,
    ) -> None:
        """`foresee` is asked only of requests that have a target."""
        self.admission = admission
        self._metrics = metrics
        self._clock = clock
        self._foresee = foresee
        self._targets = targets
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by the entry's number
        self._looking: asyncio.Handle | None = None
        self._closed = False

    def go_by(self, limits: Limits, foresee: Callable[[Job], Outlook], targets: Targets) -> None:
        """Other limits and targets from now on. Who was admitted stays, and so do the targets of those who wait."""
        self.admission.limits = limits
        self._foresee, self._targets = foresee, targets
        self._let_in(self.admission.promote(self._clock()))

    def close(self) -> None:
        """Nobody new is admitted: the proxy is stopping. Those that wait already wait on."""
        self._closed = True

    async def enter(self, job: Job) -> Entry:
        """A place within the limits, until `leave`. Raises BadRequest, TooLarge, Overloaded, QueueTimeout,
        ShuttingDown."""
        if self._closed:
            raise ShuttingDown("the proxy is stopping: send the request to another")
        wish = self._wish(job)
        now = 0.0 if wish is None else self._clock()
        try:
            entry, refused = self.admission.arrive(wishes.priority(job), job.nbytes, wish, now)
            if refused is not None:
                self._tell(refused)
            if entry.place is Place.WAITING:
                try:
                    await self._wait(entry, now)
                except BaseException:
                    self.leave(entry)
                    raise
        except ProxyError as error:
            modality = "media" if job.items else "text"
            self._metrics.refused.labels(modality, str(error.code)).inc()
            raise
        return entry

    def leave(self, entry: Entry) -> None:
        """Give the place back. Idempotent."""
        self._let_in(self.admission.leave(entry, self._clock() if self._waiting else 0.0))

    def _wish(self, job: Job) -> Wish | None:
        targets = self._targets
        first = wishes.first_token(job) or targets.first
        rooms = targets.rooms and bool(job.items)
        if first == targets.pace == inf and not rooms:
            return None
        return Wish(bool(job.items), partial(self._foresee, job), first, targets.pace)

    def _let_in(self, promoted: list[Entry]) -> None:
        for entry in promoted:
            future = self._waiting.get(entry.number)
            if future is not None and not future.done():
                future.set_result(None)
        if self._looking is None and self._waiting and self.admission.wishing:
            loop = asyncio.get_running_loop()
            # Whoever was let in is charged when this turn of the loop is over; then the next one's time is foreseen.
            self._looking = loop.call_soon(self._look) if promoted else loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = None
        self._let_in(self.admission.promote(self._clock()))

    async def _wait(self, entry: Entry, began: float) -> None:
        future = self._waiting[entry.number] = asyncio.get_running_loop().create_future()
        patience = self.admission.limits.patience
        timer = asyncio.timeout(min(patience, entry.latest - began))
        self._let_in([])
        try:
            with self._metrics.queued.track_inprogress():
                async with timer:
                    await future
        except TimeoutError:
            if not timer.expired():
                raise
            raise self._in_vain(entry) from None
        finally:
            del self._waiting[entry.number]

    def _in_vain(self, entry: Entry) -> ProxyError:
        patience = self.admission.limits.patience
        if entry.wish is None or (entry.parked is None and self._clock() < entry.latest):
            return QueueTimeout(f"no place became free within {patience:g} s (--queue-timeout)")
        outlook = entry.wish.foresee()
        if outlook.room:
            return late(entry, entry.wish, outlook)
        return QueueTimeout(f"no room for embeddings (--max-embedding-bytes) within {patience:g} s (--queue-timeout)")

    def _tell(self, refused: Entry) -> None:
        future = self._waiting.get(refused.number)
        if future is not None and not future.done():
            future.set_exception(full(self.admission.waiting))
