"""The contract of a balancing policy. A policy sees keys and loads, never a request, and raises no HTTP error."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Policy(Protocol):
    """Chooses among the instances of one role. Synchronous, deterministic, without clock and dice."""

    def choose(self, candidates: Collection[str]) -> str:
        """One of `candidates` (not empty; in any order, and a different set each time).

        Counts as a use of that instance for ties. The load follows through `changed` and need not be guessed here.
        """

    def changed(self, key: str, load: int) -> None:
        """The ledger's load of `key` is `load` from now on. Called for every lease taken and returned, once."""

    def forget(self, key: str) -> None:
        """`key` has left the fleet. Unknown keys are ignored."""
