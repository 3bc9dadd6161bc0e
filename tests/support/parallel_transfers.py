"""The transfers of an engine of several ranks in one loop: real transfers, and links that are calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engines.language.parallel.carrier import Carrier
from engines.language.parallel.messages import Freed, Question, Write, unpacked_spans
from engines.language.parallel.transfers import RankTransfers
from engines.transfer import create
from engines.transfer.base import Arena, Transfer, TransferError
from engines.transfer.tasks import Tasks

NBYTES = 256


class Call:
    """A link that is a call; questions are what they are after a trip over a socket. `fails` may raise for one."""

    def __init__(self, tasks: Tasks) -> None:
        self.fails: Callable[[Question], None] = lambda question: None
        self.rank: RankTransfers | None = None
        self._tasks = tasks
        self._freed: dict[int, Callable[[], None]] = {}

    async def ask(self, question: Question) -> dict[str, Any]:
        assert self.rank is not None
        self.fails(question)
        await asyncio.sleep(0)
        travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(question), type=Question)
        return await self.rank.answer(travelled) or {}

    def tell(self, question: Question) -> None:
        self._tasks.spawn(self.ask(question))

    def on_freed(self, key: int, call: Callable[[], None]) -> None:
        self._freed[key] = call

    def freed(self, freed: Freed) -> None:
        if freed.key in self._freed:
            self._freed.pop(freed.key)()


@dataclass
class Side:
    """One engine: a transfer and an arena of `NBYTES` per rank. `written` are the errands of the other ranks."""

    transfers: list[Transfer]
    arenas: list[Arena]
    links: list[Call]
    written: list[Write] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carrier = Carrier(self.transfers[0], self.links, self.written.append)

    def fill(self, value: int) -> None:
        """Every rank's arena with numbers of its own."""
        for rank, arena in enumerate(self.arenas):
            arena.buffer[:] = bytes([value + rank]) * NBYTES

    def held(self) -> list[dict[str, int]]:
        return [{name: count for name, count in transfer.audit().items() if count} for transfer in self.transfers]

    def run_errands(self) -> None:
        for link in self.links:
            for write in self.written:
                assert link.rank is not None
                link.rank.write(write.key, unpacked_spans(write.source), unpacked_spans(write.target), None, write.last)
        self.written.clear()


@asynccontextmanager
async def side(ranks: int) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        transfers, arenas, links = [], [], []
        for rank in range(ranks):
            transfer = create("memory", timeout=2.0)
            transfer.facts = {"num_blocks": 4}
            arenas.append(transfer.allocate("kv", NBYTES))
            await transfer.start()
            stack.push_async_callback(transfer.close)
            transfers.append(transfer)
            if rank:
                link = Call(tasks)
                link.rank = RankTransfers(transfer, arenas[-1], link.freed)
                stack.push_async_callback(link.rank.close)
                links.append(link)
        yield Side(transfers, arenas, links)


def refused(_question: Question) -> None:
    raise TransferError("this rank will not")
