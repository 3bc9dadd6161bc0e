"""One transfer in a process of its own, driven by JSON lines on stdin: `python -m tests.engines.transfer.child shm`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

import uvloop

from engines.transfer import create
from engines.transfer.base import TransferError
from tests.engines.transfer.nodes import SIZE


class Child:
    def __init__(self, transport: str) -> None:
        self.transfer = create(transport, timeout=1.0)
        self.arena = self.transfer.allocate("arena", SIZE)
        self.tickets: dict[str, Any] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.writes = 0

    async def fill(self, offset: int, length: int, byte: int) -> None:
        self.arena.buffer[offset : offset + length] = bytes([byte]) * length

    async def bytes_in(self, offset: int, length: int) -> list[int]:
        return sorted(set(bytes(self.arena.buffer[offset : offset + length])))

    async def publish(self, key: str, offset: int, length: int) -> dict[str, Any]:
        return await self.transfer.publish(key, self.arena, [(offset, length)], ttl=None, on_free=lambda: None)

    async def withdraw(self, key: str) -> None:
        self.transfer.withdraw(key)

    async def reserve(self, offset: int, length: int, timeout: float) -> dict[str, Any]:
        ticket = self.transfer.reserve(self.arena, [(offset, length)], timeout=timeout, on_free=lambda: None)
        self.tickets[ticket.id] = ticket
        task = asyncio.ensure_future(self._wait(ticket))
        self.tasks.add(task)
        return ticket.offer()

    async def _wait(self, ticket: Any) -> None:
        with contextlib.suppress(TransferError):
            await ticket.wait()
        ticket.release()

    async def push_forever(self, offer: dict[str, Any], target: int, length: int) -> None:
        """Claim, then write the same bytes again and again."""
        push = await self.transfer.open(offer, timeout=60)
        task = asyncio.ensure_future(self._write(push, target, length))
        self.tasks.add(task)

    async def _write(self, push: Any, target: int, length: int) -> None:
        with contextlib.suppress(TransferError):
            while not push.halted:
                for _ in range(4):
                    push.write(self.arena, [(0, length)], [(target, length)])
                self.writes += 1
                await asyncio.sleep(0.005)
        push.release(lambda: None)

    async def written(self) -> int:
        return self.writes

    async def audit(self) -> dict[str, int]:
        return self.transfer.audit()


async def main(transport: str) -> None:
    child = Child(transport)
    await child.transfer.start()
    loop = asyncio.get_running_loop()
    print(json.dumps("ready"), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, arguments = json.loads(line)
        print(json.dumps(await getattr(child, name)(**arguments)), flush=True)
    await child.transfer.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
