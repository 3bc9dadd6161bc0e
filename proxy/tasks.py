"""Tasks that end together: a group that fails with its first failure itself, a race of two. And work that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class together:
    """Like asyncio.TaskGroup: the first failure cancels all the others, and leaving waits for all.

    Raises that failure itself. Afterwards nothing of the tasks is held: an error's traceback has the frames in which
    this object is named, and through those would have a circle with all that the tasks had.
    """

    __slots__ = ("_group",)

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        return self

    def create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        if self._group is None:
            raise RuntimeError("tasks are created within `async with`")
        return self._group.create_task(work)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None
        first: BaseException | None = None
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as failed:
            failed.__traceback__ = None
            first = _first(failed)
        finally:
            self._group = None
            del error, trace
        if first is not None:
            try:
                raise first  # here, where the group of failures is not its context
            finally:
                del first


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    error = failed.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def end_if_cancelled() -> None:
    """Raise CancelledError if this task was told to end and what it awaited has kept that to itself.

    `asyncio.wait_for` does so before Python 3.12 where its result comes at that moment, and so does what uses it.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def race(
    first: Coroutine[Any, Any, T],
    second: Callable[[], Coroutine[Any, Any, T] | None],
    delay: float,
    failure: type[Exception],
) -> T:
    """The result of `first`, or of a `second` started when `delay` seconds were not enough, whichever is there sooner.

    The loser is cancelled and waited for. A `failure` of one is raised only when no other is left to wait for; both
    failed: that of the first.
    """

    async def outcome(runner: Coroutine[Any, Any, T]) -> T | Exception:
        try:
            return await runner
        except failure as error:
            return error

    async with together() as group:
        tasks = [group.create_task(outcome(first))]
        done, _ = await asyncio.wait(tasks, timeout=delay)
        if not done and (runner := second()) is not None:
            tasks.append(group.create_task(outcome(runner)))
        while True:
            done, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            won = [task for task in done if not isinstance(task.result(), failure)]
            if won or not running:
                break
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
    result = (won[0] if won else tasks[0]).result()
    if isinstance(result, Exception):
        raise result
    return result


class Owed:
    """Work that is finished even if whoever wanted it has left. `len` of it runs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, or its error; to cancel this does not end `work`."""
        task = asyncio.create_task(work)  # noqa: TID251 - kept here until its end, or `stop`
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Cancel what runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of interest only to whoever has not left
