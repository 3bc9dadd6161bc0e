"""The transfers of a rank that is not the first, in the hands of rank 0: what `carrier` asks for is done here.

Rank 0 names each ticket, push and publication by a key, and gives it back by `Release`. Loop only, but `write` and
`staged`, which belong to the model thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from engines.language.mirror import Ready
from engines.language.parallel.messages import (
    Abort,
    Fetch,
    Finish,
    Freed,
    Open,
    Publish,
    Question,
    Release,
    Reserve,
    Wait,
    unpacked_spans,
)
from engines.transfer.base import Arena, Push, Spans, Ticket, Transfer, TransferError
from engines.transfer.tasks import Tasks


class RankTransfers:
    """`say` takes what rank 0 is to know. `close` when nothing is asked any more."""

    def __init__(self, transfer: Transfer, arena: Arena, say: Callable[[Freed], None]) -> None:
        self._transfer = transfer
        self._arena = arena
        self._say = say
        self._tasks = Tasks()
        self._tickets: dict[int, Ticket] = {}
        self._pushes: dict[int, Push] = {}
        self._names: dict[int, str] = {}  # of publications
        self._failed: dict[int, TransferError] = {}  # what a write of a push said at once
        self._open: set[int] = set()  # pushes that are neither finished nor aborted
        self._copies: deque[Ready] = deque()

    def __repr__(self) -> str:
        return f"<RankTransfers {len(self._tickets)} tickets, {len(self._pushes)} pushes, {len(self._names)} published>"

    async def close(self) -> None:
        await self._tasks.close()

    # -- in the model thread ------------------------------------------------------------------------------------------

    def staged(self, ready: Ready) -> None:
        """A copy has begun of blocks that something here holds."""
        self._copies.append(ready)

    def write(self, key: int, source: Spans, target: Spans, ready: Ready | None, last: bool) -> None:
        """Go on with a push; one that has ended meanwhile needs no more."""
        push = self._pushes.get(key)
        if push is None:
            return
        try:
            push.write(self._arena, source, target, ready, last)
        except TransferError as error:
            self._failed.setdefault(key, error)

    # -- on the loop --------------------------------------------------------------------------------------------------

    async def answer(self, question: Question) -> dict[str, Any] | None:
        """Raises TransferError."""
        match question:
            case Reserve():
                spans, freed = unpacked_spans(question.spans), partial(self._freed, question.key)
                ticket = self._transfer.reserve(self._arena, spans, timeout=question.timeout, on_free=freed)
                self._tickets[question.key] = ticket
                return ticket.offer()
            case Fetch():
                await self._tickets[question.key].fetch(question.where)
            case Wait():
                await self._tickets[question.key].wait()
            case Open():
                self._pushes[question.key] = await self._transfer.open(question.offer, timeout=question.timeout)
                self._open.add(question.key)
            case Finish():
                await self._finish(question.key)
            case Abort():
                self._open.discard(question.key)
                await self._pushes[question.key].abort(question.reason)
            case Publish():
                return await self._publish(question)
            case Release():
                await self._release(question.key)
            case _:
                raise TypeError(f"{type(question).__name__} is no question about transfers")
        return None

    async def _finish(self, key: int) -> None:
        if key in self._failed:
            raise self._failed[key]
        await self._pushes[key].finish()
        self._open.discard(key)

    async def _publish(self, asked: Publish) -> dict[str, Any]:
        await self._settle()
        where = await self._transfer.publish(
            asked.name,
            self._arena,
            unpacked_spans(asked.spans),
            ttl=asked.ttl,
            once=True,
            on_free=partial(self._freed, asked.key),
        )
        self._names[asked.key] = asked.name
        return where

    async def _release(self, key: int) -> None:
        if key in self._tickets:
            self._tickets[key].release()
        elif key in self._names:
            self._transfer.withdraw(self._names[key])
        elif (push := self._pushes.pop(key, None)) is not None:
            if key in self._open:
                self._open.discard(key)
                await push.abort("its engine gave up")
            self._failed.pop(key, None)
            push.release(partial(self._freed, key))
        else:
            self._say(Freed(key))  # it never came to be

    def _freed(self, key: int) -> None:
        self._tickets.pop(key, None)
        self._names.pop(key, None)
        self._tasks.spawn(self._tell_freed(key))

    async def _tell_freed(self, key: int) -> None:
        await self._settle()
        self._say(Freed(key))

    async def _settle(self) -> None:
        """Until every copy is over that has begun by now."""
        while self._copies:
            await asyncio.to_thread(self._copies.popleft())
