"""Turn by turn. Looks at no load: for fleets of equals with requests of one size, and as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Collection

from proxy.balancer.board import Standing


class RoundRobin:
    """The candidate that was chosen longest ago, by whichever worker: turns stay fair while instances come and go."""

    def choose(self, candidates: Collection[str], standing: Callable[[str], Standing]) -> str:
        return min(candidates, key=lambda key: (standing(key).used, key))

    def changed(self, key: str, standing: Standing) -> None:
        pass

    def forget(self, key: str) -> None:
        pass
