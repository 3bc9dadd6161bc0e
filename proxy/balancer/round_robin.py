"""Turn by turn. Looks at no load: for fleets of equals with requests of one size, and as a yardstick."""

from __future__ import annotations

from collections.abc import Callable

from proxy.balancer.board import Standing
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool


class RoundRobin:
    """The candidate that was chosen longest ago, by whichever worker: turns stay fair while instances come and go."""

    def __init__(self, means: Means) -> None:
        self._used: dict[str, int] = {}

    def choose(self, pool: Pool, demand: Demand, standing: Callable[[str], Standing]) -> str:
        for key in pool:
            if key not in self._used:
                self._used[key] = standing(key).used
        return min(pool, key=lambda key: (self._used[key], key))

    def changed(self, key: str, standing: Standing) -> None:
        if key in self._used:  # else it has left the fleet, and its last leases come back
            self._used[key] = standing.used

    def forget(self, key: str) -> None:
        self._used.pop(key, None)
