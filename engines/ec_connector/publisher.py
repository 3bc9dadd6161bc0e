"""Lets other engines fetch what this engine's worker has put into a folder. It encodes nothing.

With the storage transport the folder is the shared one, and the file is all there is to publish. Else the bytes move
from the shelf into an arena, where they stay until they are read, for a time at most; the least recently named goes
when room is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from engines.dtypes import named
from engines.ec_connector.shelf import Shelf
from engines.encoder.cache import EmbeddingCache, Entry, State
from engines.errors import Overloaded
from engines.transfer.base import Arena, GoneError, Transfer
from engines.transfer.spans import table
from engines.transfer.storage import Source, describe, load


class Publisher(Protocol):
    def __contains__(self, key: str) -> bool:
        """Whether it can be fetched now. Thread-safe."""

    async def publish(self, key: str) -> Mapping[str, Any]:
        """What an entry says of it: num_tokens, dtype, shape, where; empty if the worker has put nothing there.

        Raises EngineError, TransferError, OSError, ValueError.
        """


def described(folder: Shelf, key: str) -> dict[str, Any]:
    """The entry of a file in a shared folder. Raises TransferError, ValueError."""
    dtype, shape = describe(folder.path(key))
    where = {"transport": "storage", "key": key, "nbytes": math.prod(shape) * named(dtype).itemsize}
    return _entry(dtype, shape, where)


def _entry(dtype: str, shape: tuple[int, ...], where: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_tokens": shape[0], "dtype": dtype, "shape": list(shape), "where": where}


class FolderPublisher:
    """Files that every engine sees."""

    def __init__(self, shared: Shelf) -> None:
        self._shared = shared

    def __contains__(self, key: str) -> bool:
        return self._shared.path(key).exists()

    async def publish(self, key: str) -> Mapping[str, Any]:
        try:
            return described(self._shared, key)
        except GoneError:
            return {}


class ArenaPublisher:
    """Files of the shelf, moved into memory that the transfer serves. `handle_ttl`: seconds."""

    def __init__(self, transfer: Transfer, arena: Arena, shelf: Shelf, handle_ttl: float) -> None:
        self._transfer, self._arena, self._shelf, self._ttl = transfer, arena, shelf, handle_ttl
        self._cache = EmbeddingCache(arena.nbytes)
        self._served: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._served

    async def publish(self, key: str) -> Mapping[str, Any]:
        entry = self._cache.find(key)
        if entry is None:
            try:
                entry = await self._move(key)
            except GoneError:
                return {}
        self._shelf.discard(key)
        self._cache.named(entry, time.monotonic() + self._ttl)
        found: Mapping[str, Any] = entry.value
        return found

    async def _move(self, key: str) -> Entry:
        path = self._shelf.path(key)
        dtype, shape = describe(path)
        nbytes = math.prod(shape) * named(dtype).itemsize
        entry = self._room(key, nbytes)
        try:
            spans = [(entry.offset, nbytes)]
            load(Source(path, nbytes), self._arena.buffer, table(spans, self._arena.nbytes), lambda: False)
            where = await self._transfer.publish(
                key,
                self._arena,
                spans,
                ttl=None,
                dtype=dtype,
                shape=shape,
                on_free=partial(self._on_free, entry),
                on_read=partial(self._cache.was_read, entry),
            )
        except BaseException:
            self._cache.abandon(entry)
            raise
        self._cache.commit(entry, _entry(dtype, shape, where), 0.0)
        self._served.add(key)
        return entry

    def _on_free(self, entry: Entry) -> None:
        if entry.state is State.LEAVING:  # else: the transfer closes, and everything with it
            self._cache.freed(entry)

    def _room(self, key: str, nbytes: int) -> Entry:
        while (entry := self._cache.reserve(key, nbytes)) is None:
            victim = self._cache.evict(time.monotonic())
            if victim is None:
                raise Overloaded("no room for the embedding: raise cache_bytes or lower handle_ttl", code="cache_full")
            self._served.discard(victim.key)
            self._transfer.withdraw(victim.key)
        return entry
