"""The server's life: listening, sweeping, stopping."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from proxy.http.client import Client
from proxy.http.message import Response
from proxy.http.server import Limits, Request, Server
from proxy.tls import Connector, Files, Listener
from tests.support.raw_http import refuse, serving
from tests.support.tls import Authority

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


async def test_while_it_drains_each_answer_is_the_last_of_its_connection() -> None:
    async with serving(ok) as s, asyncio.timeout(10):
        before = await s.connect()
        before.send(GET)
        assert "connection" not in (await before.answer())[1]
        s.server.drain()
        for client in (before, await s.connect()):
            client.send(GET)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.closed() == b""


@pytest.mark.parametrize("secure", [False, True])
async def test_who_has_connected_when_it_stops_is_served(secure: bool, tmp_path: Path) -> None:
    """Sockets that nobody has accepted yet, and requests that nobody has read: the loop has had no turn for them."""
    authority = Authority(tmp_path)
    tls = Listener(authority.files("server")).context if secure else None
    async with serving(ok, tls=tls) as s, asyncio.timeout(10):
        kept = None if secure else socket.create_connection(("127.0.0.1", s.port))
        if kept is not None:
            while "0 connections" in repr(s.server):
                await asyncio.sleep(0.001)
            kept.send(GET)
        waiting = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(20)]

        def ask(sock: socket.socket) -> bytes:
            sock.settimeout(10)
            with authority.trusting().wrap_socket(sock, server_hostname="localhost") if secure else sock as one:
                if sock is not kept:
                    one.sendall(GET)
                return b"".join(iter(lambda: one.recv(1000), b""))

        asking = [asyncio.create_task(asyncio.to_thread(ask, sock)) for sock in [*waiting, *filter(None, [kept])]]
        await s.server.stop(5)
        answers = await asyncio.gather(*asking)
        assert all(answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer for answer in answers)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", s.port))


async def test_whom_the_loop_has_just_accepted_is_served() -> None:
    async with serving(ok) as s, asyncio.timeout(10):
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", s.port)) as client:
            client.sendall(GET)
            client.setblocking(False)
            stopped = loop.create_future()
            # In the turn after the next, when the loop has accepted the connection, and begun nothing with it.
            loop.call_soon(loop.call_soon, stopped.set_result, None)
            await stopped
            await s.server.stop(5)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


async def test_a_head_that_has_begun_to_arrive_may_end() -> None:
    async with serving(ok) as s, asyncio.timeout(10):
        client = await s.connect()
        client.send(GET[:10])
        while "1 connections" not in repr(s.server):
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(s.server.stop(5))
        await asyncio.sleep(0.2)
        client.send(GET[10:])
        assert (await client.answer())[0] == 200
        await stopping


async def test_idle_connections_are_open_while_requests_come() -> None:
    """A front that keeps connections uses one of them and then another: none is closed before its turn."""
    async with serving(ok) as s, asyncio.timeout(20):
        clients = [await s.connect() for _ in range(8)]
        for client in clients:
            client.send(GET)
            assert (await client.answer())[0] == 200
        stopping = asyncio.create_task(s.server.stop(10))
        for client in clients:
            await asyncio.sleep(0.1)  # all of them take longer than it would wait for one
            client.send(GET)
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
        await stopping


async def test_who_is_cut_has_a_last_word() -> None:
    async def handle(request: Request) -> Response:
        request.begin(200, {}, None, b"first")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert request.cut
            request.write(b" last")
            request.end()
        return None  # type: ignore[return-value]

    async with serving(handle) as s, asyncio.timeout(10):
        client = await s.connect()
        client.send(GET)
        while "1 busy" not in repr(s.server):
            await asyncio.sleep(0.001)
        await s.server.stop(0.05)
        assert (await client.answer())[2] == b"first last"


async def test_a_client_that_leaves_is_no_cut() -> None:
    cut: list[bool] = []

    async def handle(request: Request) -> Response:
        try:
            await asyncio.Event().wait()
        finally:
            cut.append(request.cut)
        return Response()

    async with serving(handle) as s, asyncio.timeout(10):
        client = await s.connect()
        client.send(GET)
        while "1 busy" not in repr(s.server):
            await asyncio.sleep(0.001)
        client.close()
        while not cut:
            await asyncio.sleep(0.001)
        assert cut == [False]


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


@pytest.mark.parametrize("size", [1, 100_000, 3 << 20])
async def test_bodies_of_every_size_pass_both_ways_in_tls(tmp_path: Path, size: int) -> None:
    async def echo(request: Request) -> Response:
        return Response(200, bytes(await request.read()))

    ca, body = Authority(tmp_path), bytes(range(256)) * (size // 256) + b"!"
    caller = Connector(Files(ca=ca.path))
    async with serving(echo, tls=Listener(ca.files("server")).context) as s:
        client = Client(5.0, tls=lambda: caller.context)
        client.open()
        for _ in range(2):
            async with client.request("POST", f"https://127.0.0.1:{s.port}", "/", body=body) as exchange:
                assert await exchange.read() == body
        assert "1 connections" in repr(s.server)
        await client.close()


async def test_who_shakes_no_hands_is_not_waited_for(tmp_path: Path) -> None:
    tls = Listener(Authority(tmp_path).files("server")).context
    async with serving(ok, tls=tls, head_seconds=0.05) as s:
        client = await s.connect()
        assert await client.closed() == b""


async def test_who_speaks_plainly_to_tls_is_hung_up_on(tmp_path: Path) -> None:
    async with serving(ok, tls=Listener(Authority(tmp_path).files("server")).context) as s:
        client = await s.connect()
        client.send(GET)
        assert b"HTTP" not in await client.closed()


async def test_an_answer_before_the_end_of_a_body_arrives_in_tls(tmp_path: Path) -> None:
    """One half of such a connection cannot be closed alone."""
    ca = Authority(tmp_path)
    async with serving(ok, tls=Listener(ca.files("server")).context) as s:
        client = await s.connect(ssl=ca.trusting())
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        assert (await client.answer())[2] == b"ok"
