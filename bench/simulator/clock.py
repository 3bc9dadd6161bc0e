"""Simulated time: events in a heap, each a call at a time. Equal times run in the order of asking."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now` is in seconds from 0. Nothing is taken back: who no longer wants its event must know it when called."""

    __slots__ = ("_events", "_turn", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._turn = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def __repr__(self) -> str:
        return f"<Clock {self.now:.6f} s, {len(self._events)} events>"

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call at `when`, or now if that is past."""
        self._turn += 1
        heappush(self._events, (max(when, self.now), self._turn, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self._turn += 1
        heappush(self._events, (self.now + seconds, self._turn, call, arguments))

    def run(self) -> None:
        """Until nothing is left to happen."""
        events = self._events
        while events:
            self.now, _, call, arguments = heappop(events)
            call(*arguments)
