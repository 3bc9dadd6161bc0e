"""Turn by turn. Looks at no load: for fleets of equals with requests of one size, and as a yardstick."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count


class RoundRobin:
    """The candidate that was chosen longest ago, so that turns stay fair while instances come and go."""

    def __init__(self) -> None:
        self._turns = count(1)
        self._last: dict[str, int] = {}

    def choose(self, candidates: Collection[str]) -> str:
        key = min(candidates, key=lambda key: (self._last.get(key, 0), key))
        self._last[key] = next(self._turns)
        return key

    def changed(self, key: str, load: int) -> None:
        pass

    def forget(self, key: str) -> None:
        self._last.pop(key, None)
