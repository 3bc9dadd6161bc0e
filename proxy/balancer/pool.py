"""The candidates of one choice. The same object until the fleet changes, so that what is derived of it can be kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxy.core import Instance


class Pool(Collection[str]):
    """URLs in their own order, so that the first of equals is the same in every worker. Equal only to itself."""

    __slots__ = ("__weakref__", "by_url", "kept", "position", "urls", "weights")

    def __init__(self, instances: Iterable[Instance]) -> None:
        self.by_url = {instance.url: instance for instance in instances}
        self.urls = tuple(sorted(self.by_url))
        self.position = {url: number for number, url in enumerate(self.urls)}
        weights = [self.by_url[url].weight for url in self.urls]
        # Capacities beside each other, in the pool's order; None where all are the same.
        self.weights: NDArray[np.float64] | None = np.array(weights) if len(set(weights)) > 1 else None
        self.kept: dict[object, Any] = {}  # what others derive of it, each under a key of its own; gone with the pool

    def __repr__(self) -> str:
        return f"<Pool of {len(self.urls)}>"

    def __len__(self) -> int:
        return len(self.urls)

    def __iter__(self) -> Iterator[str]:
        return iter(self.urls)

    def __contains__(self, url: object) -> bool:
        return url in self.by_url

    def without(self, urls: Collection[str]) -> Pool:
        return Pool(instance for url, instance in self.by_url.items() if url not in urls)
