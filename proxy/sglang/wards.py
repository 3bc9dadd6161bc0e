"""Requests of ours that wait at SGLang language servers for embeddings: none is hung up on before those are there.

A server of 0.5.23 dies of a caller that leaves meanwhile. So a request that is over for its client, which has left or
got an error, goes on unseen until its server waits no more. What servers ask for is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proxy.core import Job
from proxy.dialects.sglang import rid
from proxy.errors import ProxyError, Refused
from proxy.relay import Sink
from proxy.sglang import pieces
from proxy.sglang.valve import Valve
from proxy.tasks import together

T = TypeVar("T")
Work = Callable[[Sink], Coroutine[Any, Any, None]]

_FIRST_CALL_S = 2.0  # from a request's bytes to its server's first call for embeddings
_TICK_S = 0.5  # for a server to take what was delivered before it hears of anything else
PATIENCE_S = 170.0
"""A server waits 180 s for an embedding, and then dies of that."""


@dataclass(slots=True, eq=False)
class Ward:
    """One of them."""

    job: Job
    error: asyncio.Future[ProxyError]
    calls: int = 0  # of its server for embeddings, that are being answered
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Within, its server waits for an embedding."""
        self.calls += 1
        self.begun.set()
        self.idle.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls:
                self.idle.set()

    def fail(self, index: int, error: ProxyError) -> None:
        """Item `index`, in the servers' order, gets no embedding: the first such error is the client's answer."""
        if not self.error.done():
            if isinstance(error, Refused) and index < len(self.job.items):
                error.param = sorted(self.job.items, key=pieces.rank)[index].param
            self.error.set_result(error)

    async def delivered(self) -> None:
        """Until its server waits for no embedding, or has long given up."""
        try:
            async with asyncio.timeout(_FIRST_CALL_S):
                await self.begun.wait()
            async with asyncio.timeout(PATIENCE_S):
                await self.idle.wait()
        except TimeoutError:
            return
        await asyncio.sleep(_TICK_S)


class Wards:
    def __init__(self) -> None:
        self._wards: dict[str, Ward] = {}  # by rid
        self._group: together | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._wards)

    def get(self, name: str) -> Ward | None:
        """By the `rid` that its server has for it."""
        return self._wards.get(name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within, requests may come; what goes on unseen ends with it."""
        async with together() as self._group:
            yield
            for task in self._tasks:
                task.cancel()

    async def guard(self, job: Job, sink: Sink, work: Work) -> None:
        """Run `work`, which has a server answer `job`. Raises what it raises, or why an item has no embedding."""
        ward = self._wards[rid(job.id)] = Ward(job, asyncio.get_running_loop().create_future())
        valve = Valve(sink)
        task = self._background(_outcome(work(valve)))
        try:
            await asyncio.wait((task, ward.error), return_when=asyncio.FIRST_COMPLETED)
            if ward.error.done():
                raise ward.error.result()
        finally:
            valve.shut()  # what the server may still say is about a black picture, or for nobody
            if task.done():
                del self._wards[rid(job.id)]
            else:
                self._background(self._see_off(ward, task))
        if (failure := task.result()) is not None:
            raise failure

    async def _see_off(self, ward: Ward, task: asyncio.Task[Any]) -> None:
        try:
            await ward.delivered()
        finally:
            task.cancel()
            del self._wards[rid(ward.job.id)]

    def _background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        assert self._group is not None, "requests come within `running`"
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _outcome(work: Coroutine[Any, Any, None]) -> ProxyError | None:
    try:
        await work
    except ProxyError as error:
        return error
    return None
