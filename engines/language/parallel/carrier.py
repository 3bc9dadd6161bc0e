"""One transfer out of those of all ranks: what an engine hands over, each rank hands over its heads of.

    receiver                              sender
    rank 0 ─ offer ─┐                ┌─▶ rank 0 ─ writes its heads ─▶ rank 0
    rank 1 ─ offer ─┴─ {"ranks": …} ─┴─▶ rank 1 ─ writes its heads ─▶ rank 1

Both sides have as many ranks, or the handshake is refused. With one rank, a handle is that rank's own, as it would be
without this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from engines.language.parallel.messages import (
    Abort,
    Fetch,
    Finish,
    Open,
    Publish,
    Question,
    Release,
    Reserve,
    Wait,
    Write,
    packed_spans,
)
from engines.transfer.base import Address, Arena, LayoutMismatch, Push, Spans, Ticket, Transfer

RANKS = "ranks"


class Link(Protocol):
    """Rank 0's way to another rank. Loop only."""

    async def ask(self, question: Question) -> dict[str, Any]:
        """Raises TransferError as the rank's transfer does, ShuttingDown if the rank is gone."""

    def tell(self, question: Question) -> None: ...

    def on_freed(self, key: int, call: Callable[[], None]) -> None:
        """`call` once the rank says that `key` is free."""


def parts_of(handle: Mapping[str, Any], size: int) -> list[Mapping[str, Any]]:
    """An offer or a publication by ranks.

    :raises LayoutMismatch: it is of another number of ranks than `size`.
    """
    parts = handle.get(RANKS, [handle])
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise LayoutMismatch("malformed handle: its ranks are no list of handles")
    if len(parts) != size:
        raise LayoutMismatch(
            f"--tensor-parallel is {len(parts)} at the peer and {size} here: give prefill and decode the same"
        )
    return parts


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return parts[0] if len(parts) == 1 else {RANKS: parts}


async def every(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
    """What all return, in order. The first error ends the others and is raised."""

    async def one(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(awaitable)) for awaitable in awaitables]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Carrier:
    """Rank 0's transfer, and with each thing that is done with it the same on `others`. Loop only.

    `errand` takes what the others' model threads are to do; see `Steps.errand`.
    """

    def __init__(
        self, transfer: Transfer, others: Sequence[Link] = (), errand: Callable[[Write], None] | None = None
    ) -> None:
        self._transfer = transfer
        self._others = others
        self._errand = errand
        self._keys = count()
        self._published: dict[str, int] = {}  # keys of those that are not free, by name

    @property
    def size(self) -> int:
        return 1 + len(self._others)

    def audit(self) -> dict[str, int]:
        """As `Transfer.audit`; a publication counts until every rank's part of it is free."""
        return {**self._transfer.audit(), "publications": len(self._published)}

    @property
    def address(self) -> Address:
        return self._transfer.address

    async def reserve(
        self, arena: Arena, spans: Spans, *, timeout: float, on_free: Callable[[], None]
    ) -> ParallelTicket:
        """As `Transfer.reserve`; when it returns, all ranks have."""
        freed = after(self.size, on_free)
        own = self._transfer.reserve(arena, spans, timeout=timeout, on_free=freed)
        key = self._key(freed)
        ticket = ParallelTicket(own, key, self._others)
        try:
            await ticket.reserve(Reserve(key, packed_spans(spans), timeout))
        except BaseException:
            ticket.release()
            raise
        return ticket

    async def open(self, offer: Mapping[str, Any], *, timeout: float) -> Push:
        own, *parts = parts_of(offer, self.size)
        push = await self._transfer.open(own, timeout=timeout)
        if not self._others:
            return push
        whole = ParallelPush(push, next(self._keys), self._others, self._errand)
        try:
            pairs = zip(self._others, parts, strict=True)
            await every(link.ask(Open(whole.key, dict(part), timeout)) for link, part in pairs)
        except BaseException as error:
            await push.abort(f"another rank of the sender failed: {error!r}")
            whole.release(lambda: None)
            raise
        return whole

    async def publish(
        self, name: str, arena: Arena, spans: Spans, *, ttl: float | None, on_free: Callable[[], None]
    ) -> dict[str, Any]:
        """As `Transfer.publish`, to be read once."""

        def free() -> None:
            self._published.pop(name, None)
            on_free()

        freed = after(self.size, free)
        where = await self._transfer.publish(name, arena, spans, ttl=ttl, once=True, on_free=freed)
        key = self._published[name] = self._key(freed)
        question = Publish(key, name, packed_spans(spans), ttl)
        try:
            return joined([where, *await every(link.ask(question) for link in self._others)])
        except BaseException:
            self.withdraw(name)
            raise

    def withdraw(self, name: str) -> None:
        """As `Transfer.withdraw`."""
        if (key := self._published.get(name)) is not None:
            for link in self._others:
                link.tell(Release(key))
        self._transfer.withdraw(name)

    def _key(self, freed: Callable[[], None]) -> int:
        """A new key; `freed` is called as each of the others frees its part."""
        key = next(self._keys)
        for link in self._others:
            link.on_freed(key, freed)
        return key


def after(calls: int, then: Callable[[], None]) -> Callable[[], None]:
    """What calls `then` when it has been called so many times."""
    left = iter(range(calls - 1, -1, -1))

    def call() -> None:
        if not next(left):
            then()

    return call


class ParallelTicket:
    """A `Ticket` of all ranks."""

    def __init__(self, own: Ticket, key: int, others: Sequence[Link]) -> None:
        self._own = own
        self._key = key
        self._others = others
        self._offers: list[dict[str, Any]] = []
        self._released = False

    async def reserve(self, question: Reserve) -> None:
        self._offers = await every(link.ask(question) for link in self._others)

    async def fetch(self, where: Mapping[str, Any]) -> None:
        own, *parts = parts_of(where, 1 + len(self._others))
        pairs = zip(self._others, parts, strict=True)
        await every([self._own.fetch(own), *(link.ask(Fetch(self._key, dict(part))) for link, part in pairs)])

    def offer(self) -> dict[str, Any]:
        return joined([self._own.offer(), *self._offers])

    async def wait(self) -> None:
        await every([self._own.wait(), *(link.ask(Wait(self._key)) for link in self._others)])

    def release(self) -> None:
        self._own.release()
        if not self._released:
            self._released = True
            for link in self._others:
                link.tell(Release(self._key))


class ParallelPush:
    """A `Push` of all ranks."""

    def __init__(self, own: Push, key: int, others: Sequence[Link], errand: Callable[[Write], None] | None) -> None:
        self.key = key
        self._own = own
        self._others = others
        self._errand = errand

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._own.facts

    def write(
        self, arena: Arena, source: Spans, target: Spans, ready: Callable[[], None] | None = None, last: bool = False
    ) -> None:
        """In the model thread, during a step."""
        self._own.write(arena, source, target, ready, last)
        if self._errand is not None:
            self._errand(Write(self.key, packed_spans(source), packed_spans(target), ready is not None, last))

    async def finish(self) -> None:
        await every([self._own.finish(), *(link.ask(Finish(self.key)) for link in self._others)])

    async def abort(self, reason: str) -> None:
        await every([self._own.abort(reason), *(link.ask(Abort(self.key, reason)) for link in self._others)])

    def release(self, on_free: Callable[[], None]) -> None:
        freed = after(1 + len(self._others), on_free)
        for link in self._others:
            link.on_freed(self.key, freed)
            link.tell(Release(self.key))
        self._own.release(freed)
