"""A server with one scripted handler, and clients that speak bytes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from proxy.http.message import HttpError, Response
from proxy.http.server import Limits, Request, Server

Handle = Callable[[Request], Awaitable[Response | None]]


class Client:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, and the body out of its framing."""
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            status = int(first.split(" ")[1])
            return status, headers, b"" if status == 100 else await self._body(headers)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "transfer-encoding" not in headers:
            if "content-length" in headers:
                return await self.reader.readexactly(int(headers["content-length"]))
            return await self.reader.read()
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def closed(self) -> bytes:
        """What comes until the server ends the connection."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def close(self) -> None:
        self.writer.transport.abort()


class Serving:
    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self.clients: list[Client] = []

    async def connect(self, **options: Any) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, **options))
        self.clients.append(client)
        return client

    async def connect_socket(self, sock: socket.socket) -> Client:
        client = Client(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        client = await self.connect()
        client.send(data)
        return await client.answer()


def refuse(error: HttpError) -> Response:
    return Response(error.status, str(error).encode())


@asynccontextmanager
async def serving(
    handle: Handle, grace: float = 0.2, tls: ssl.SSLContext | None = None, **limits: Any
) -> AsyncIterator[Serving]:
    async def edge(request: Request) -> Response | None:
        try:
            return await handle(request)
        except HttpError as error:
            return refuse(error)

    server = Server(edge, refuse, Limits(**limits))
    found = Serving(server, await server.start("127.0.0.1", 0, tls=tls))
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        await server.stop(grace)
        assert repr(server) == "<Server 0 connections, 0 busy>"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
