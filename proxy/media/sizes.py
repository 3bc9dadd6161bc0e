"""How large media are that the proxy has never seen: those behind URLs, once an encoder has told. Fetches nothing.

Whoever reads an encoder's reply calls `learn` for each of its items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from proxy.core import Handle, Item
from proxy.media.formats import Shape

Grid: TypeAlias = tuple[int, int, int]
"""Patches in time, height and width, as an encoder cut them."""

CAPACITY = 16384  # media remembered
_LONGEST = 2048  # characters of a URL; longer ones hold media that could not be read, and are not kept for that


class Sizes:
    """`find` may be called by any thread; what was told longest ago is forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._known: dict[str, Grid | Shape] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, identity: str) -> Grid | Shape | None:
        """Of the media with this `Item.identity`, as their encoder cut them, or as their own first bytes tell."""
        return self._known.get(identity)

    def learn(self, item: Item, handle: Handle) -> None:
        """`handle` is the encoder's answer for `item`. An image that came whole has nothing to teach."""
        if (item.modality == "image" and item.mm_hash is not None) or len(item.identity) > _LONGEST:
            return
        grid = grid_of(handle.metadata)
        if grid is not None:
            self._keep(item.identity, grid)

    def measured(self, item: Item, shape: Shape) -> None:
        """Somebody has looked at the media behind the URL of `item`; an encoder's word comes before that."""
        if not isinstance(self.find(item.identity), tuple):
            self._keep(item.identity, shape)

    def _keep(self, identity: str, size: Grid | Shape) -> None:
        self._known.pop(identity, None)
        self._known[identity] = size
        if len(self._known) > self._capacity:
            del self._known[next(iter(self._known))]


def grid_of(metadata: Mapping[str, Any]) -> Grid | None:
    """The grid among a handle's metadata (`image_grid_thw`, `video_grid_thw`), bare or in a list of one; None if there
    is none that makes sense."""
    for name, value in metadata.items():
        if not name.endswith("_grid_thw"):
            continue
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = value[0]
        if isinstance(value, list) and len(value) == 3 and all(type(n) is int and 0 < n < 1 << 20 for n in value):
            return value[0], value[1], value[2]
    return None
