"""Questions between workers over real sockets, and workers that are not there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proxy.errors import NotFound
from proxy.siblings import Siblings


async def test_an_answer_comes_back_whole(tmp_path: Path) -> None:
    one, other = Siblings(tmp_path, 2, 0), Siblings(tmp_path, 2, 1)
    assert (one.others, other.others) == ((1,), (0,))

    async def answer(body: bytes) -> tuple[int, bytes]:
        return 409, body[::-1] * 3

    async with other.listening(answer):
        for body in (b"", b"abc", b"x" * 1_000_000):
            assert await one.ask(1, body) == (409, body[::-1] * 3)


async def test_a_worker_that_is_not_there_knows_no_request(tmp_path: Path) -> None:
    one = Siblings(tmp_path, 2, 0)
    with pytest.raises(NotFound, match="worker 1"):
        await one.ask(1, b"{}")
    (tmp_path / "1.sock").touch()  # nobody listens
    with pytest.raises(NotFound, match="worker 1"):
        await one.ask(1, b"{}")


async def test_a_worker_that_dies_before_it_answers_is_told(tmp_path: Path) -> None:
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "1.sock")
    with pytest.raises(NotFound, match="is no more"):
        await Siblings(tmp_path, 2, 0).ask(1, b"{}")
    server.close()


async def test_one_who_gives_up_asking_leaves_the_other_unharmed(tmp_path: Path) -> None:
    one, other = Siblings(tmp_path, 2, 0), Siblings(tmp_path, 2, 1)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def answer(body: bytes) -> tuple[int, bytes]:
        asked.set()
        await go_on.wait()
        return 200, body

    async with other.listening(answer):
        asking = asyncio.create_task(one.ask(1, b"{}"))
        await asked.wait()
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        assert await one.ask(1, b"again") == (200, b"again")
