"""Questions between workers over real sockets, and workers that are not there."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.errors import NotFound
from proxy.workers.siblings import Answer, Kind, Siblings


async def test_an_answer_comes_back_whole(tmp_path: Path) -> None:
    one, other = Siblings(tmp_path, 2, 0), Siblings(tmp_path, 2, 1)
    assert (one.others, other.others) == ((1,), (0,))

    async def answer(body: bytes) -> tuple[int, bytes]:
        return 409, body[::-1] * 3

    async with other.listening({Kind.CALLBACK: answer}):
        for body in (b"", b"abc", b"x" * 1_000_000):
            assert await one.ask(1, Kind.CALLBACK, body) == (409, body[::-1] * 3)


async def test_a_worker_that_is_not_there_knows_no_request(tmp_path: Path) -> None:
    one = Siblings(tmp_path, 2, 0)
    with pytest.raises(NotFound, match="worker 1"):
        await one.ask(1, Kind.CALLBACK, b"{}")
    (tmp_path / "1.sock").touch()  # nobody listens
    with pytest.raises(NotFound, match="worker 1"):
        await one.ask(1, Kind.CALLBACK, b"{}")


async def test_a_worker_that_dies_before_it_answers_is_told(tmp_path: Path) -> None:
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "1.sock")
    with pytest.raises(NotFound, match="is no more"):
        await Siblings(tmp_path, 2, 0).ask(1, Kind.CALLBACK, b"{}")
    server.close()


async def test_one_who_gives_up_asking_leaves_the_other_unharmed(tmp_path: Path) -> None:
    one, other = Siblings(tmp_path, 2, 0), Siblings(tmp_path, 2, 1)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def answer(body: bytes) -> tuple[int, bytes]:
        asked.set()
        await go_on.wait()
        return 200, body

    async with other.listening({Kind.CALLBACK: answer}):
        asking = asyncio.create_task(one.ask(1, Kind.CALLBACK, b"{}"))
        await asked.wait()
        asking.cancel()
        await asyncio.wait([asking])
        go_on.set()
        assert await one.ask(1, Kind.CALLBACK, b"again") == (200, b"again")


async def test_each_kind_has_its_own_answer(tmp_path: Path) -> None:
    one, other = Siblings(tmp_path, 2, 0), Siblings(tmp_path, 2, 1)

    def saying(kind: Kind) -> Answer:
        async def answer(body: bytes) -> tuple[int, bytes]:
            return 200, body + kind.name.encode()

        return answer

    async with other.listening({kind: saying(kind) for kind in Kind}):
        for kind in Kind:
            assert await one.ask(1, kind, b"a ") == (200, b"a " + kind.name.encode())


async def test_whoever_is_dead_or_slow_or_knows_nothing_is_not_waited_for(tmp_path: Path) -> None:
    crew = [Siblings(tmp_path, 5, worker) for worker in range(5)]

    async def knows(body: bytes) -> tuple[int, bytes]:
        return 200, b"yes " + body

    async def knows_not(body: bytes) -> tuple[int, bytes]:
        return 404, b"no"

    go_on = asyncio.Event()

    async def sleeps(body: bytes) -> tuple[int, bytes]:
        await go_on.wait()
        return 200, b"too late"

    async with AsyncExitStack() as stack:  # worker 4 is dead
        for worker, answer in ((1, knows), (2, knows_not), (3, sleeps)):
            await stack.enter_async_context(crew[worker].listening({Kind.RECEIPTS: answer}))
        assert await crew[0].ask_all(Kind.RECEIPTS, b"r1", 0.2) == [b"yes r1"]
        go_on.set()
