"""The server's life: listening, sweeping, stopping."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxy.http.message import Response
from proxy.http.server import Limits, Request, Server
from tests.support.raw_http import refuse, serving

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def ok(request: Request) -> Response:
    return Response(200, b"ok")


async def test_it_listens_where_it_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            await Server(ok, refuse).start("127.0.0.1", taken.getsockname()[1])
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = Server(ok, refuse)
    assert await server.start(sock=sock) == sock.getsockname()[1]
    await server.stop(0)


async def test_stopping_lets_a_request_end_and_takes_no_other() -> None:
    gate, running = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> Response:
        running.set()
        await gate.wait()
        return Response(200, b"late")

    async with serving(handle) as s, asyncio.timeout(10):
        busy, idle = await s.connect(), await s.connect()
        busy.send(GET)
        await running.wait()
        stopping = asyncio.create_task(s.server.stop(5))
        assert await idle.closed() == b""
        with pytest.raises(OSError):
            await s.connect()
        gate.set()
        status, headers, body = await busy.answer()
        assert (status, body, headers["connection"]) == (200, b"late", "close")
        await stopping


async def test_what_outlives_the_grace_time_is_cut() -> None:
    cancelled = asyncio.Event()

    async def handle(request: Request) -> Response:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return Response()

    async with serving(handle) as s, asyncio.timeout(10):
        client = await s.connect()
        client.send(GET)
        while "1 busy" not in repr(s.server):
            await asyncio.sleep(0.001)
        await s.server.stop(0.05)
        assert cancelled.is_set() and await client.closed() == b""


def test_the_sweep_is_as_fine_as_the_shortest_limit() -> None:
    assert Limits().sweep_seconds == 1.0
    assert Limits(head_seconds=0.4).sweep_seconds == pytest.approx(0.1)
