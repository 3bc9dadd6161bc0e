"""What an engine remembers: the least recently used goes first, by size. Sizes are in a unit of the owner's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class Cache:
    """Keys and their sizes, `capacity` in all. One that is larger than that is not kept."""

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._sizes: OrderedDict[Hashable, float] = OrderedDict()
        self.used = 0.0

    def __repr__(self) -> str:
        return f"<Cache {self.used:g} of {self._capacity:g}, {len(self._sizes)} keys>"

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def touch(self, key: Hashable) -> bool:
        """Whether `key` is there; it is then the last to go."""
        if key not in self._sizes:
            return False
        self._sizes.move_to_end(key)
        return True

    def put(self, key: Hashable, size: float) -> None:
        if self.touch(key) or size > self._capacity:
            return
        self._sizes[key] = size
        self.used += size
        while self.used > self._capacity:
            self.used -= self._sizes.popitem(last=False)[1]

    def clear(self) -> None:
        self._sizes.clear()
        self.used = 0.0
