"""The contract of a balancing policy. A policy sees instances and loads, never a request, and raises no HTTP error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.board import Standing
from proxy.balancer.ledger import Ledger
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, Role

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Demand(NamedTuple):
    """What one leg asks of whoever takes it. Work is in tokens of its role's unit, see `Ledger`."""

    work: int  # > 0; where nothing of it is held
    key: str = ""  # equal keys are the same work, and light where that was done before; empty: like no other
    held: Mapping[str, int] = NOTHING  # by URL: the work (> 0) left where a part of it is held
    ready: float = 0.0  # seconds from now before which it cannot start
    transfer: Mapping[str, float] = NOTHING  # by URL: seconds to bring there what it needs; absent: none
    room: int = 0  # tokens that it keeps: of KV while it runs, of an embedding as long as there is room
    at_once: bool = False  # where it is held, it waits for nothing that is pending there

    def at(self, url: str) -> int:
        """The work at this instance."""
        return self.held.get(url, self.work)


@dataclass(frozen=True, slots=True)
class Means:
    """What a policy may work with."""

    role: Role = BOTH
    rates: Rates = field(default_factory=lambda: Rates(1.0))
    dice: Callable[[], float] = float  # numbers in [0, 1)


class Policy(Protocol):
    """Chooses among the instances of one role. Synchronous, and deterministic but for the dice it is given.

    Policies subclass it. What they keep for a pool they keep with it: at 1,000 instances no choice may look at each.
    """

    listens: bool = False  # whether `changed` is to be called
    joins: bool = True  # whether equal work that is being done right now draws a demand to where that is
    times: NDArray[np.float64] | None = None  # seconds that the last choice among several went by, in the pool's order

    def choose(self, pool: Pool, demand: Demand, ledger: Ledger) -> str:
        """One of `pool` (not empty, and another one at any time). The caller charges it."""
        raise NotImplementedError

    def changed(self, url: str, standing: Standing) -> None:
        """The ledger's entry of `url`: told for every lease taken and returned in this process."""
        return
