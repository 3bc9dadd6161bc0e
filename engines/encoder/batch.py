"""Chooses which waiting items share the next forward. It runs nothing and knows no tensor.

First come, first served: a batch is the longest prefix of the queue that fits the patch budget, so no item
overtakes another and none waits for ever. An item larger than the budget runs alone. Where several devices wait for
work, a batch is no more than a share of what there is, so that none of them stands idle.
"""

from __future__ import annotations

from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Batcher(Generic[ItemT]):
    """A queue of items, each with its number of patches. Items are told apart by identity."""

    def __init__(self, budget: int) -> None:
        if budget <= 0:
            raise ValueError(f"a batch needs a budget of at least one patch, got {budget}")
        self.budget = budget
        self._queue: dict[int, tuple[ItemT, int]] = {}
        self._patches = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def patches(self) -> int:
        """Patches of all items that wait."""
        return self._patches

    def add(self, item: ItemT, patches: int) -> None:
        if patches <= 0:
            raise ValueError(f"an item has at least one patch, got {patches}")
        if id(item) in self._queue:
            raise ValueError("the item waits already")
        self._queue[id(item)] = (item, patches)
        self._patches += patches

    def discard(self, item: ItemT) -> bool:
        """Forget an item. False: it was not waiting (any more)."""
        found = self._queue.pop(id(item), None)
        if found is None:
            return False
        self._patches -= found[1]
        return True

    def take(self, shares: int = 1) -> list[ItemT]:
        """Remove and return the next batch, where `shares` of them are to be had now; empty when nothing waits."""
        batch: list[ItemT] = []
        room = min(self.budget, -(-self._patches // shares))
        for item, patches in list(self._queue.values()):
            if batch and patches > room:
                break
            batch.append(item)
            room -= patches
            self.discard(item)
        return batch

    def __repr__(self) -> str:
        return f"<Batcher {len(self)} waiting, {self._patches} patches, budget {self.budget}>"
