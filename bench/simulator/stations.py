"""A queue with servers, first come first served: host processes that prepare media, links that receive bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from bench.simulator.clock import Clock


class Station:
    """`servers` work at once. Each call comes at the end of its service, unless `clear` came before."""

    __slots__ = ("_busy", "_clock", "_life", "_queue", "_servers")

    def __init__(self, clock: Clock, servers: int = 1) -> None:
        self._clock = clock
        self._servers = servers
        self._busy = 0
        self._life = 0
        self._queue: deque[tuple[float, Callable[..., None], tuple[Any, ...]]] = deque()

    def __repr__(self) -> str:
        return f"<Station {self._busy} of {self._servers} busy, {len(self._queue)} waiting>"

    def serve(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        if self._busy < self._servers:
            self._busy += 1
            self._clock.after(seconds, self._served, self._life, call, arguments)
        else:
            self._queue.append((seconds, call, arguments))

    def clear(self) -> None:
        """Forget all that waits or is served."""
        self._life += 1
        self._busy = 0
        self._queue.clear()

    def _served(self, life: int, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if life != self._life:
            return
        if self._queue:
            seconds, *following = self._queue.popleft()
            self._clock.after(seconds, self._served, life, *following)
        else:
            self._busy -= 1
        call(*arguments)
