"""One life of the client after another, each of which may end at any moment; a real master behind them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.processes import Child
from engines.errors import SetupError
from engines.store import link
from engines.store.link import MISSING, Client, Link, StoreLost
from tests.support.embedding_store import address
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NBYTES = 1 << 20


@asynccontextmanager
async def linked(*masters: str) -> AsyncIterator[Link]:
    async with Link(masters, "127.0.0.1", "tcp", NBYTES).running() as running:
        yield running


async def connected(running: Link, other_than: Client | None = None) -> Client:
    await until(lambda: running.client not in (None, other_than))
    assert running.client is not None
    return running.client


def pid(client: Client) -> int:
    assert client._process is not None
    return client._process.pid


async def test_bytes_go_there_and_come_back(server: Child) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        with client.span(5) as span, client.span(5) as other:
            assert span is not None and other is not None
            span.view[:] = b"hello"
            assert await client.ask("size", "link", 5.0) == MISSING
            assert await client.ask("put", "link", 5.0, span) == 0
            assert await client.ask("get", "link", 5.0, other) == 5
            assert bytes(other.view) == b"hello"
        assert client.ranges.free == NBYTES
    assert not Path(f"/proc/{pid(client)}").exists()


async def test_a_span_that_does_not_fit_is_none(server: Child) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        with client.span(NBYTES) as span, client.span(1) as other:
            assert span is not None and other is None


async def test_whoever_asks_a_client_that_hangs_is_told_in_time_and_it_is_replaced(server: Child) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        os.kill(pid(client), signal.SIGSTOP)
        with pytest.raises(StoreLost, match=r"no answer to size within 0\.1 s"):
            await client.ask("size", "link", 0.1)
        assert running.client is None
        after = await connected(running, client)
        assert await after.ask("size", "nothing", 5.0) == MISSING
        with pytest.raises(StoreLost, match="ended"):
            await client.ask("size", "link", 5.0)


async def test_a_client_that_answers_late_is_asked_again_from_then_on(
    server: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE", 30.0)
    async with linked(address(server)) as running:
        client = await connected(running)
        os.kill(pid(client), signal.SIGSTOP)
        with client.span(64) as span:
            lost = await asyncio.gather(*(client.ask("get", "no", 0.1, span) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in lost] == [StoreLost] * 2
        assert (running.client, client.late, client.ranges.free) == (None, 2, NBYTES - 64)
        os.kill(pid(client), signal.SIGCONT)
        assert await connected(running) is client
        assert client.ranges.free == NBYTES


async def test_all_who_wait_for_a_client_that_dies_are_told(server: Child) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        os.kill(pid(client), signal.SIGSTOP)
        asked = [asyncio.create_task(client.ask("size", "link", 30.0)) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(pid(client), signal.SIGKILL)
        assert {type(error) for error in await asyncio.gather(*asked, return_exceptions=True)} == {StoreLost}
        await connected(running, client)


async def test_an_error_that_is_no_plain_refusal_ends_the_client(
    server: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        monkeypatch.setattr(link, "REFUSALS", frozenset())
        with pytest.raises(StoreLost, match="size failed with -704"):
            await client.ask("size", "nothing", 5.0)
        await connected(running, client)


async def test_a_span_outlives_whoever_was_cancelled_until_the_call_is_over(server: Child) -> None:
    async with linked(address(server)) as running:
        client = await connected(running)
        os.kill(pid(client), signal.SIGSTOP)

        async def get() -> None:
            with client.span(64) as span:
                await client.ask("get", "nothing", 30.0, span)

        asked = asyncio.create_task(get())
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert client.ranges.free == NBYTES - 64
        os.kill(pid(client), signal.SIGCONT)
        await until(lambda: client.ranges.free == NBYTES)


async def test_masters_are_tried_in_turn(server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        nobody = f"127.0.0.1:{silent.getsockname()[1]}"
        async with linked(nobody, address(server)) as running:
            assert await (await connected(running)).ask("size", "nothing", 5.0) == MISSING


async def test_pauses_grow_while_lives_are_of_no_use(server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def told(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(link, "LONGEST_PAUSE", 0.15)
    async with linked(address(server)) as running:
        client = await connected(running)
        monkeypatch.setattr(link.asyncio, "sleep", told)
        for useful in (False, False, False, True, False):
            before = len(slept)
            if useful:
                with client.span(1) as span:
                    await client.ask("put", "used", 5.0, span)
            client.kill()
            while len(slept) == before or running.client in (None, client):
                await sleep(0.01)
            client = running.client
    assert slept == [0.05, 0.1, 0.15, 0.05, 0.1]


async def test_a_library_that_cannot_be_loaded_is_said_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "mooncake"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"libibverbs.*apt-get install"):
        async with linked("127.0.0.1:1"):
            pass
