"""The process alone, by its pipes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from deploy.processes import Child
from engines.store.client import CONNECTED, FIRST_QUESTION, LOADED, Answer, Question
from tests.support.embedding_store import address

pytestmark = pytest.mark.asyncio(loop_scope="module")

NBYTES = 1 << 20


class Process:
    def __init__(self, master: str, slab: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engines.store.client", master, "127.0.0.1", "tcp", str(slab), str(NBYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[slab],
        )

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        return msgspec.json.decode(self._process.stdout.readline(), type=Answer)

    def ask(self, id: int, *question: Any) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(Question(id, *question)) + b"\n")
        self._process.stdin.flush()
        answer = self.answer()
        assert answer.id == id
        return answer.result

    def end(self) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            return self._process.wait(10)
        finally:
            self._process.kill()
            self._process.stdout.close()


@contextmanager
def slab() -> Iterator[tuple[int, mmap.mmap]]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, NBYTES)
    with mmap.mmap(fd, NBYTES) as memory:
        yield fd, memory
    os.close(fd)


async def test_what_is_put_from_the_slab_comes_back_to_it(server: Child) -> None:
    with slab() as (fd, memory):
        process = Process(address(server), fd)
        assert (process.answer(), process.answer()) == (Answer(LOADED, 0), Answer(CONNECTED, 0))
        memory[100:105] = b"hello"
        ids = iter(range(FIRST_QUESTION, 100))
        assert process.ask(next(ids), "size", "client") == -704
        assert process.ask(next(ids), "put", "client", 100, 5) == 0
        assert process.ask(next(ids), "size", "client") == 5
        assert process.ask(next(ids), "get", "client", 200, 5) == 5
        assert memory[200:205] == b"hello"
        assert process.ask(next(ids), "get", "client", 200, 4) == -600
        assert process.ask(next(ids), "remove", "client") == 0
        assert process.ask(next(ids), "size", "client") == -704
        assert process.end() == 0, "its input ended"
