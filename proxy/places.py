"""A number of places, taken several at once, first come first served. Nobody waits for half of what it needs."""

from __future__ import annotations

import asyncio
from collections import deque


class Taken:
    """What one has taken; leaving the block gives back what is left of it."""

    def __init__(self, places: Places | None, count: int) -> None:
        self._places = places
        self._count = count

    def leave(self) -> None:
        """Give one place back; nothing if there is none."""
        self._give(min(1, self._count))

    def __enter__(self) -> Taken:
        return self

    def __exit__(self, *_: object) -> None:
        self._give(self._count)

    def _give(self, count: int) -> None:
        self._count -= count
        if self._places is not None and count:
            self._places.give(count)


NO_PLACES = Taken(None, 0)
"""Where there is no limit."""


class Places:
    """`free` of them are free; `waiting` wait."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.free = count

    def __repr__(self) -> str:
        return f"<Places {self.free} of {self._count} free, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def take(self, count: int) -> Taken:
        """Wait for `count` places, or for all there are if it is more."""
        count = min(count, self._count)
        if self._queue or self.free < count:
            await self._turn(count)
        else:
            self.free -= count
        return Taken(self, count)

    def give(self, count: int) -> None:
        self.free += count
        while self._queue and self._queue[0][0] <= self.free:
            wanted, turn = self._queue.popleft()
            if not turn.done():
                self.free -= wanted
                turn.set_result(None)

    async def _turn(self, count: int) -> None:
        entry = (count, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry[1].done() and not entry[1].cancelled():
                self.give(count)  # it was granted in the same moment
            else:
                if entry in self._queue:
                    self._queue.remove(entry)
                self.give(0)  # the next may need less
            raise
