"""Calls to a scripted peer that speaks bytes: framings, reuse, pauses, failures, hanging up."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from proxy.http.client import Client, ConnectFailed, Cut, Late
from proxy.tls import Connector, Files
from tests.support.tls import Authority

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def take(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")), 0)
    return head, await reader.readexactly(length)


class Peer:
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.connections = 0
        self.left = asyncio.Event()  # a caller hung up


@asynccontextmanager
async def peer(script: Script, **how: Any) -> AsyncIterator[tuple[Peer, Client]]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            found.left.set()
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found = Peer(server.sockets[0].getsockname()[1])
    client = Client(5.0, **how)
    client.open()
    try:
        yield found, client
    finally:
        await client.close()
        server.close()
        await asyncio.wait(tasks or {asyncio.create_task(asyncio.sleep(0))}, timeout=10)


def says(*answers: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await take(reader)
            writer.write(answer)

    return script


async def whole(p: Peer, client: Client, body: bytes | list[bytes | memoryview] = b"x") -> tuple[int, bytes]:
    async with client.request("POST", p.url, "/p", "x-a: 1\r\n", body) as exchange:  # type: ignore[arg-type]
        return exchange.status, await exchange.read()


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        CHUNKED + b"1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 103 Early Hints\r\nX: y\r\nContent-Length: 9\r\n\r\n" + OK,
    ],
)
async def test_answers_of_every_framing_and_their_connection_again(answer: bytes) -> None:
    async with peer(says(answer, OK)) as (p, client):
        assert await whole(p, client) == (200, b"ok")
        assert await whole(p, client) == (200, b"ok")
        assert p.connections == 1


async def test_an_answer_may_last_until_its_connection_ends() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nto the end")
        await writer.drain()
        writer.close()

    async with peer(script) as (p, client):
        assert await whole(p, client) == (200, b"to the end")


async def test_what_is_sent() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            seen.append(await take(reader))
            writer.write(OK)

    async with peer(script) as (p, client):
        large = bytes(range(256)) * 20_000
        await whole(p, client, [b"a", memoryview(large), b"b"])
        await whole(p, client, large)
        async with client.request("GET", p.url, "/g") as exchange:
            await exchange.read()
    host = f"host: 127.0.0.1:{p.port}\r\n".encode()
    assert seen[0] == (
        b"POST /p HTTP/1.1\r\n" + host + b"content-length: 5120002\r\nx-a: 1\r\n\r\n",
        b"a" + large + b"b",
    )
    assert seen[1][1] == large
    assert seen[2][0] == b"GET /g HTTP/1.1\r\n" + host + b"\r\n"


@pytest.mark.parametrize(
    ("answer", "begun"),
    [
        (b"", False),
        (b"HTTP/1.1 200 OK\r\nConte", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", True),
        (CHUNKED + b"5\r\nok", True),
        (CHUNKED + b"2\r\nok\r\n", True),
        (b"<html>", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", False),
        (CHUNKED + b"zz\r\n", True),
    ],
)
async def test_answers_that_break(answer: bytes, begun: bool) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with peer(script) as (p, client):
        with pytest.raises(Cut) as caught:
            await whole(p, client)
        assert caught.value.begun is begun
        with pytest.raises(Cut):
            await whole(p, client)
        assert p.connections == 2, "a broken connection is not used again"


@pytest.mark.parametrize(
    ("beginning", "endless"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-more: and more\r\n"),
        (b"HTTP/1.1 200 OK\r\nx-more: ", b"and more "),
        (b"", b"HTTP/1.1 103 Early Hints\r\nlink: <a>\r\n\r\n"),
        (CHUNKED + b"2\r\nok\r\n0\r\n", b"x-more: and more\r\n"),
        (CHUNKED + b"2", b";x=y"),
    ],
    ids=["fields", "a field", "interim answers", "trailers", "an extension"],
)
async def test_what_is_no_body_does_not_fill_memory(beginning: bytes, endless: bytes) -> None:
    sent = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await take(reader)
        writer.write(beginning)
        while True:
            writer.write(endless * 1000)
            sent += len(endless) * 1000
            await writer.drain()

    async with peer(script) as (p, client):
        with pytest.raises(Cut, match="not HTTP: more than 262144 bytes"):
            await whole(p, client)
        await p.left.wait()
        assert sent < 16 << 20, "it is hung up on"


@pytest.mark.parametrize("last", [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", OK + b"more"])
async def test_connections_that_cannot_be_trusted_are_not_used_again(last: bytes) -> None:
    async with peer(says(last)) as (p, client):
        assert await whole(p, client) == (200, b"ok")
        await asyncio.sleep(0.01)
        assert await whole(p, client) == (200, b"ok")
        assert p.connections == 2


async def test_a_connection_that_the_engine_closed_is_not_used_again() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(OK)
        await writer.drain()
        writer.close()

    async with peer(script) as (p, client):
        assert await whole(p, client) == (200, b"ok")
        async with asyncio.timeout(10):
            while "1 open" in repr(client):
                await asyncio.sleep(0.001)
        assert await whole(p, client) == (200, b"ok")


async def test_idle_connections_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.http.client._KEEPALIVE_S", 0.02)
    async with peer(says(OK, OK)) as (p, client):
        await whole(p, client)
        await asyncio.sleep(0.05)
        await whole(p, client)
        assert p.connections == 2


async def test_hosts_that_clients_choose_keep_few_connections() -> None:
    async with peer(says(OK), idle=2) as (p, client), AsyncExitStack() as stack:
        for host in range(1, 6):
            server = await asyncio.start_server(_ok, f"127.0.0.{host}", 0)
            await stack.enter_async_context(server)
            p.url = f"http://127.0.0.{host}:{server.sockets[0].getsockname()[1]}"
            assert await whole(p, client) == (200, b"ok")
        assert repr(client).count("1 idle") == 2


async def _ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await says(OK)(reader, writer)
    await reader.read()
    writer.close()


async def test_leaving_before_the_end_hangs_up() -> None:
    async with peer(says(CHUNKED + b"2\r\nok\r\n")) as (p, client), asyncio.timeout(10):
        async with client.request("POST", p.url, "/", "", b"") as exchange:
            assert await exchange.chunk() == b"ok"
        await p.left.wait()


async def test_cancelling_before_the_answer_hangs_up() -> None:
    async with peer(says()) as (p, client), asyncio.timeout(10):
        asking = asyncio.create_task(whole(p, client))
        while "1 open" not in repr(client):
            await asyncio.sleep(0.001)
        asking.cancel()
        await p.left.wait()
        await asyncio.wait([asking])
        assert asking.cancelled()


async def test_cancelling_at_any_moment_leaves_no_connection() -> None:
    async with peer(says()) as (p, client), asyncio.timeout(20):
        for turns in range(40):
            asking = asyncio.create_task(whole(p, client))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
        while client._origins[p.url].open:
            await asyncio.sleep(0.001)


async def test_an_answer_of_which_enough_was_read_gives_its_connection_back_by_itself() -> None:
    go = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(CHUNKED + b"2\r\nok\r\n")
        await go.wait()
        writer.write(b"4\r\nmore\r\n0\r\n\r\n")
        await take(reader)
        writer.write(OK)

    async with peer(script) as (p, client), asyncio.timeout(10):
        async with client.request("POST", p.url, "/", "", b"") as exchange:
            assert await exchange.chunk() == b"ok"
            exchange.enough = True
        assert "0 idle" in repr(client)
        go.set()
        while "1 idle" not in repr(client):
            await asyncio.sleep(0.001)
        assert await whole(p, client) == (200, b"ok") and p.connections == 1


async def test_nobody_there() -> None:
    client = Client(5.0)
    with pytest.raises(RuntimeError, match="async with"):
        async with client.request("GET", "http://127.0.0.1:1", "/"):
            pass
    client.open()
    with pytest.raises(ConnectFailed, match="Connection refused"):
        async with client.request("GET", "http://127.0.0.1:1", "/"):
            pass
    await client.close()


async def test_a_slow_reader_stops_the_engine() -> None:
    drained = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20) + bytes(64 << 20))
        await writer.drain()
        drained.set()

    async with peer(script) as (p, client), asyncio.timeout(20):  # noqa: SIM117 - the second needs the first
        async with client.request("POST", p.url, "/", "", b"") as exchange:
            for _ in range(100):
                await asyncio.sleep(0.001)
            assert not drained.is_set()
            assert exchange._held_bytes < 2 << 20
            size = 0
            while chunk := await exchange.chunk():
                size += len(chunk)
            assert size == 64 << 20


async def test_a_piped_answer_comes_as_it_arrives_and_whole_chunks_may_take_the_shortcut() -> None:
    parts = [b"2\r\nab\r\n", b"2\r\ncd\r\n2\r\nef\r\n", b"2\r\ng", b"h\r\n", b"2\r\nij\r\n", b"0\r\n\r\n"]
    go = [asyncio.Event() for _ in parts]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(CHUNKED)
        for part, ready in zip(parts, go, strict=True):
            await ready.wait()
            writer.write(part)

    async with peer(script) as (p, client), asyncio.timeout(10):
        got: list[bytes] = []
        short: list[bytes] = []

        def shortcut(data: bytes) -> bool:
            short.append(data)
            return data == b"2\r\nij\r\n"

        async with client.request("POST", p.url, "/", "", b"") as exchange:
            exchange.pipe(got.append, lambda error: None)
            exchange.shortcut(shortcut)
            for ready in go:
                ready.set()
                await asyncio.sleep(0.02)
            await exchange.end()
        assert b"".join(got) == b"abcdefgh" and got[-1] == b""
        assert short == [parts[1], parts[2], parts[4], parts[5]], "asked only between two chunks"


async def test_a_piped_answer_that_breaks_says_so_instead_of_ending() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(CHUNKED + b"2\r\nok\r\n")
        await writer.drain()
        writer.close()

    async with peer(script) as (p, client), asyncio.timeout(10):
        got: list[bytes] = []
        lost: asyncio.Future[Cut] = asyncio.get_running_loop().create_future()
        async with client.request("POST", p.url, "/", "", b"") as exchange:
            exchange.pipe(got.append, lost.set_result)
            assert (await lost).begun and got == [b"ok"]
            with pytest.raises(Cut):
                await exchange.end()


async def test_patience_may_be_renewed_by_each_piece_and_then_ends() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await take(reader)
        writer.write(CHUNKED)
        for _ in range(8):
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.1)

    async with peer(script) as (p, client):
        async with client.request("POST", p.url, "/") as exchange:
            exchange.patience(0.4, each=True)
            got = b""
            with pytest.raises(Late):
                while True:
                    got += await exchange.chunk()
        assert got == b"x" * 8
        await p.left.wait()


async def test_patience_does_not_count_while_nothing_may_come() -> None:
    async with peer(says(CHUNKED + b"1\r\nx\r\n")) as (p, client), client.request("POST", p.url, "/") as exchange:
        exchange.patience(0.2, each=True)
        exchange.pause()
        await asyncio.sleep(0.5)
        assert exchange.error is None
        exchange.resume()
        with pytest.raises(Late):
            await exchange.end()


async def test_a_connection_is_made_within_the_exchanges_patience() -> None:
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # a queue of one: later connections get no answer to their SYN
        for other in (first, second):
            other.setblocking(False)
            other.connect_ex(server.getsockname())
        client = Client(60.0)
        client.open()
        exchange = client.request("POST", f"http://127.0.0.1:{server.getsockname()[1]}", "/")
        exchange.patience(0.1)
        with pytest.raises(Late):
            await exchange.__aenter__()
        await client.close()


async def test_why_a_peer_refuses_our_certificate_is_told(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca.path)
    context.verify_mode = ssl.CERT_REQUIRED
    files = ca.files("server")
    assert files.cert is not None
    context.load_cert_chain(files.cert, files.key)
    caller = Connector(Files(ca=ca.path))
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as thread:

        def serve() -> None:
            """Tells why before it hangs up, and reads on, so that no reset overtakes what it said."""
            said, says = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls, refused = context.wrap_bio(said, says, server_side=True), False
            with listening.accept()[0] as sock, suppress(ConnectionError):
                while said.write(sock.recv(65536)):
                    try:
                        tls.do_handshake()
                    except ssl.SSLWantReadError:
                        pass
                    except ssl.SSLError:
                        refused = True
                    sock.sendall(says.read())
                    if refused:
                        break
                while sock.recv(65536):
                    pass

        serving = thread.submit(serve)
        client = Client(60.0, tls=lambda: caller.context)
        client.open()
        with pytest.raises(Cut, match="TLS: tlsv13 alert certificate required"):
            async with client.request("GET", f"https://127.0.0.1:{listening.getsockname()[1]}", "/"):
                pass
        await asyncio.wrap_future(serving)
        await client.close()
