"""The candidates of one choice. The same object until the fleet changes, so that what is derived of it can be kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from proxy.core import Instance


class Pool(Collection[str]):
    """URLs, in the fleet's order, and their instances. Never changed; equal only to itself."""

    __slots__ = ("__weakref__", "by_url")

    def __init__(self, instances: Iterable[Instance]) -> None:
        self.by_url = {instance.url: instance for instance in instances}

    def __repr__(self) -> str:
        return f"<Pool of {len(self.by_url)}>"

    def __len__(self) -> int:
        return len(self.by_url)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_url)

    def __contains__(self, url: object) -> bool:
        return url in self.by_url

    def without(self, urls: Collection[str]) -> Pool:
        return Pool(instance for url, instance in self.by_url.items() if url not in urls)
