"""Rank 1 of an engine within this process: what it answers, and how it ends. As a process it is in `test_ranks`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engines.language.parallel.group import Processes
from engines.language.parallel.messages import (
    Answered,
    Asked,
    Begin,
    Cancel,
    Connect,
    Freed,
    Load,
    Ping,
    Question,
    Release,
    Reserve,
    Restore,
    Said,
    Wait,
    packed,
    packed_spans,
)
from engines.language.parallel.rank import serve
from engines.language.parallel.wire import Line, Wire
from engines.settings import LanguageSettings
from engines.transfer.base import Transfer, TransferError
from tests.support.checkpoints import checkpoint

pytestmark = pytest.mark.asyncio


class Leader:
    """Rank 0's ends of both sockets."""

    def __init__(self, line: Line[Said], wire: Wire, task: asyncio.Task[None]) -> None:
        self.line, self.wire, self.task = line, wire, task
        self.freed: list[int] = []
        self._ids = iter(range(1000))

    async def ask(self, question: Question) -> Answered:
        asked = Asked(next(self._ids), question)
        self.line.send(asked)
        return await self.answer(asked.id)

    async def answer(self, number: int) -> Answered:
        async with asyncio.timeout(30):
            while True:
                match await self.line.receive():
                    case Answered() as answered if answered.id == number:
                        return answered
                    case Freed(key):
                        self.freed.append(key)

    async def start(self, folder: Path) -> None:
        """Bring the rank to where it runs steps."""
        assert await self.ask(begin(checkpoint("qwen3_vl"))) == Answered(0)
        meeting = folder / "meeting"
        own = asyncio.to_thread(Processes(0, 2, 10.0).connect, meeting, torch.device("cpu"))
        _, answered = await asyncio.gather(own, self.ask(Connect(str(meeting))))
        assert answered == Answered(1)

    def tell(self, command: msgspec.Struct) -> None:
        self.wire.send(msgspec.msgpack.encode(command))


def begin(model: Path) -> Begin:
    settings = LanguageSettings(model=model, tensor_parallel=2, kv_blocks=8, dtype="float32")
    return Begin(1, settings.model_dump_json().encode())


@asynccontextmanager
async def rank() -> AsyncIterator[Leader]:
    (steps, its_steps), (control, its_control) = socket.socketpair(), socket.socketpair()
    task = asyncio.create_task(serve(its_steps, its_control))
    leader = Leader(await Line[Said].on(control, Said), Wire(steps, 5.0), task)
    try:
        yield leader
    finally:
        leader.wire.close()
        leader.line.close()
        async with asyncio.timeout(10):
            await asyncio.wait({task})
        its_steps.close()


async def test_a_rank_ends_when_rank_0_is_gone() -> None:
    async with rank() as leader:
        assert await leader.ask(Ping()) == Answered(0)
        leader.line.close()
        async with asyncio.timeout(10):
            await leader.task


async def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    async with rank() as leader:
        answered = await leader.ask(begin(tmp_path / "nothing"))
        assert answered.fatal is not None
        assert "is not a folder" in answered.fatal
        assert await leader.ask(Ping()) == Answered(1)


async def test_a_rank_has_a_transfer_of_its_own(tmp_path: Path) -> None:
    async with rank() as leader:
        await leader.start(tmp_path)
        reserved = await leader.ask(Reserve(5, packed_spans([(0, 64)]), 5.0))
        assert reserved.value is not None
        assert reserved.value["spans"] == [[0, 64]]
        leader.line.send(Asked(90, Wait(5)))
        leader.line.send(Asked(91, Cancel(90)))  # nobody waits any more: no answer
        leader.line.send(Asked(92, Release(5)))
        assert await leader.answer(92) == Answered(92)
        assert await leader.ask(Ping()) == Answered(3)
        assert leader.freed == [5]


async def test_a_rank_whose_transfer_cannot_be_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_settings: LanguageSettings) -> Transfer:
        raise TransferError("no 4096 bytes of shared memory")

    monkeypatch.setattr("engines.language.parallel.rank.kv_transfer", full)
    async with rank() as leader:
        assert await leader.ask(begin(checkpoint("qwen3_vl"))) == Answered(0)
        answered = await leader.ask(Connect(str(tmp_path / "meeting")))
        assert answered.fatal == "--transfer shm: no 4096 bytes of shared memory"


async def test_a_question_that_breaks_is_answered_too() -> None:
    async with rank() as leader:
        answered = await leader.ask(Wait(5))  # before there is a transfer
        assert answered.fatal is not None
        assert "AssertionError" in answered.fatal


async def test_a_step_that_fails_ends_the_rank(tmp_path: Path) -> None:
    async with rank() as leader:
        await leader.start(tmp_path)
        leader.tell(Load(packed(np.arange(3))))
        leader.tell(Restore(77, packed([0])))
        with pytest.raises(KeyError):
            async with asyncio.timeout(10):
                await asyncio.shield(leader.task)
