"""The contract of a balancing policy. A policy sees keys and loads, never a request, and raises no HTTP error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from proxy.balancer.board import Standing


class Policy(Protocol):
    """Chooses among the instances of one role. Synchronous, deterministic, without clock and dice."""

    def choose(self, candidates: Collection[str], standing: Callable[[str], Standing]) -> str:
        """One of `candidates` (not empty; in any order, and a different set each time).

        `standing` tells the load and last use of any of them. The choice is charged by the caller, and comes back
        through `changed`.
        """

    def changed(self, key: str, standing: Standing) -> None:
        """The ledger's entry of `key`: told for every lease taken and returned here, and for what others did to the
        candidates before each choice. Often nothing has changed."""

    def forget(self, key: str) -> None:
        """`key` has left the fleet. Unknown keys are ignored."""
