"""Makes identical work in flight happen once. It caches nothing: a flight that ended is forgotten.

Everyone who asks for a key waits for the same task. Someone who is cancelled only leaves; when the last one
leaves, the task is cancelled, unless it has passed its point of no return.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")


class Flight(Generic[ResultT]):
    """One task and those who wait for it."""

    def __init__(self) -> None:
        self.waiters = 0
        self.committed = False
        self.task: asyncio.Task[ResultT]
        self.told: ResultT | None = None
        self._listeners: list[Callable[[ResultT], None]] = []

    def tell(self, ahead: ResultT) -> None:
        """What the result will be, unless the task fails."""
        self.told = ahead
        for listener in self._listeners:
            listener(ahead)

    def listen(self, listener: Callable[[ResultT], None]) -> None:
        """Call `listener` as soon as something has been told; never, if nothing is."""
        self._listeners.append(listener)
        if self.told is not None:
            listener(self.told)

    def commit(self) -> None:
        """The point of no return: from here the task runs to its end, whoever leaves."""
        self.committed = True


def _ignored(ahead: object) -> None:
    pass


class Flights(Generic[ResultT]):
    def __init__(self) -> None:
        self._flights: dict[str, Flight[ResultT]] = {}
        self._tasks: set[asyncio.Task[ResultT]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    def told(self, key: str) -> ResultT | None:
        """What the key's flight has told of its result so far."""
        flight = self._flights.get(key)
        return None if flight is None else flight.told

    async def join(
        self,
        key: str,
        work: Callable[[Flight[ResultT]], Coroutine[Any, Any, ResultT]],
        ahead: Callable[[ResultT], None] = _ignored,
    ) -> ResultT:
        """The result of the key's flight, started with `work` if there is none. Its exception is raised to all.

        `ahead` gets what the flight tells of it, see `Flight.tell`.
        """
        flight = self._flights.get(key) or self._start(key, work)
        flight.listen(ahead)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.committed and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    def _start(self, key: str, work: Callable[[Flight[ResultT]], Coroutine[Any, Any, ResultT]]) -> Flight[ResultT]:
        flight: Flight[ResultT] = Flight()
        flight.task = asyncio.create_task(work(flight))  # noqa: TID251 - owned by self._tasks, ended in close
        self._flights[key] = flight
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    def _landed(self, key: str, flight: Flight[ResultT], task: asyncio.Task[ResultT]) -> None:
        self._tasks.discard(task)
        self._forget(key, flight)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have waited

    def _forget(self, key: str, flight: Flight[ResultT]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """Cancel what can be cancelled, wait for the rest."""
        for flight in list(self._flights.values()):
            if not flight.committed:
                flight.task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
