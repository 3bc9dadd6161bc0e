import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.scripted.framing import chunk
from bench.scripted.server import Connection, Request


class Echo:
    """Says each request's body; holds the answer to /hold."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.lost = 0

    def handle(self, request: Request, connection: Connection) -> None:
        if request.path == "/hold":
            connection.left = self.left.set
        elif request.path == "/reset":
            connection.reset()
        else:
            connection.respond(200, request.body, "text/plain")

    def gone(self, connection: Connection) -> None:
        self.lost += 1


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Echo, asyncio.StreamReader, asyncio.StreamWriter]]:
    echo = Echo()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(echo.handle, echo.gone), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        async with asyncio.timeout(10):
            yield echo, reader, writer
    finally:
        writer.close()
        server.close()
        await server.wait_closed()


async def test_requests_one_behind_the_other_are_answered_in_order() -> None:
    async with serving() as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\none")
        writer.write(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"t") + chunk(b"wo") + b"0\r\n\r\n"
        )
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        got = b""
        while got.count(b"HTTP/1.1 200 OK") < 3:
            got += await reader.read(4096)
        assert [part.rpartition(b"\r\n\r\n")[2] for part in got.split(b"HTTP/1.1 200 OK")[1:]] == [b"one", b"two", b""]


async def test_a_request_cut_into_bytes_is_read() -> None:
    async with serving() as (_, reader, writer):
        for byte in b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n")


async def test_a_caller_that_leaves_before_its_answer_is_noticed() -> None:
    async with serving() as (echo, _, writer):
        writer.write(b"GET /hold HTTP/1.1\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()
        await echo.left.wait()
        assert echo.lost == 1


async def test_reset_is_a_reset() -> None:
    async with serving() as (_, reader, writer):
        writer.write(b"GET /reset HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


async def test_expect_gets_its_continue() -> None:
    async with serving() as (_, reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert b"hi" in await reader.readuntil(b"hi")
