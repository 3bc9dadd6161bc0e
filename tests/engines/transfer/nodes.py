"""Started transfers for the tests, and the few things that every test asks of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.transfer import create
from engines.transfer.base import Transfer, TransportUnavailable
from tests.support.waiting import until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
COPYING = ["memory", "shm", "zmq", "mooncake"]
IDLE = {"tickets": 0, "publications": 0, "pushes": 0, "quarantined_bytes": 0}


@dataclass
class Freed:
    """Counts `on_free` calls by name; twice is an error at once."""

    names: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> Callable[[], None]:
        def on_free() -> None:
            assert name not in self.names, f"{name} was freed twice"
            self.names.append(name)

        return on_free


@dataclass
class Node:
    """A transfer, its one arena, and what a test asks of them most."""

    transfer: Transfer
    arena: Any

    def fill(self, offset: int, data: bytes) -> None:
        self.arena.buffer[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.arena.buffer[offset : offset + length])


class Nodes:
    """Makes nodes; at the end every one must be idle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: list[Node] = []

    async def __call__(self, transport: str, *, timeout: float = 5.0, size: int = SIZE, **facts: Any) -> Node:
        try:
            transfer = create(
                transport, timeout=timeout, storage_path=self._folder / "store" if transport == "storage" else None
            )
        except TransportUnavailable as error:
            pytest.skip(str(error))
        arena = transfer.allocate("arena", size)
        transfer.facts = facts
        await transfer.start()
        node = Node(transfer, arena)
        self._all.append(node)
        return node

    async def idle(self) -> None:
        for node in self._all:
            await until(lambda node=node: node.transfer.audit() == IDLE, 20)

    def discard(self, node: Node) -> None:
        """Excused from being idle at the end."""
        self._all.remove(node)

    async def close(self) -> None:
        for node in self._all:
            await node.transfer.close()


def pattern(length, seed=1):
    return random.Random(seed).randbytes(length)


def nothing():
    pass


async def publish(node, key, data, *, offset=0, on_free=nothing, **options):
    node.fill(offset, data)
    where = await node.transfer.publish(
        key,
        node.arena,
        [(offset, len(data))],
        **{"ttl": None, "on_free": on_free, "dtype": "uint8", "shape": [len(data)], **options},
    )
    return json.loads(json.dumps(where))


def reserve(node, spans, *, timeout=10.0, on_free=nothing):
    return node.transfer.reserve(node.arena, spans, timeout=timeout, on_free=on_free)


async def open_push(node, ticket, timeout=10.0):
    return await node.transfer.open(json.loads(json.dumps(ticket.offer())), timeout=timeout)
