"""Clients and engines without sockets: bytes go straight into the proxy's own connections, by its own event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from proxy import api, openai
from proxy.core import Api
from proxy.http.client import Client, ConnectFailed, Cut, Late
from proxy.http.connection import Connection
from proxy.http.message import Response, json_response
from proxy.http.router import Router, get, post
from proxy.http.server import Limits, Request, Server
from proxy.openai import Identity

_LIMITS = Limits(head_bytes=4096, body_bytes=1 << 16)
_PATIENCE_S = 5.0
_TURNS = 50  # of the loop, for a handler to end
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Wire(asyncio.Transport):
    """One end of a connection of which the other is a list of bytes."""

    def __init__(self, written: Callable[[], None] | None = None) -> None:
        """`written` is called at the first write."""
        super().__init__()
        self._written = written
        self.out = bytearray()
        self.reading = True
        self.closed = False

    def write(self, data: Any) -> None:
        self.out += data
        if self._written is not None:
            written, self._written = self._written, None
            written()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class _Loop(asyncio.SelectorEventLoop):
    """Connects to whoever `answering` says."""

    answering: Sequence[bytes] = ()

    async def create_connection(self, protocol_factory: Any, *_: Any, **__: Any) -> Any:
        protocol = protocol_factory()
        chunks = self.answering

        def answer() -> None:
            for chunk in chunks:
                self.call_soon(_received, wire, protocol, chunk)
            self.call_soon(protocol.connection_lost, None)

        wire = Wire(answer)
        protocol.connection_made(wire)
        return wire, protocol


def _received(wire: Wire, protocol: Any, chunk: bytes) -> None:
    if not wire.closed:
        protocol.data_received(chunk)


class Connected:
    """A server and a client of the proxy's on a loop of their own, until `close`."""

    def __init__(self) -> None:
        self._loop = _Loop()
        self._failed: list[str] = []
        self._loop.set_exception_handler(lambda loop, context: self._failed.append(str(context)))
        self._client = self._run(self._open)
        routes = [get("/health", self._health), post(Api.CHAT, self._echo), get("/metrics", self._streamed)]
        self._edge = api.edge(Router(routes))

    def close(self) -> None:
        self._run(self._client.close)
        self._loop.close()

    def served(self, chunks: Sequence[bytes]) -> bool:
        """Whether any request in `chunks` was answered well. Raises AssertionError if one broke the proxy."""
        statuses = [int(status) for status in _STATUS.findall(self._run(lambda: self._serve(chunks)))]
        if 500 in statuses:
            raise AssertionError("500")
        return any(status < 400 for status in statuses)

    def answered(self, chunks: Sequence[bytes]) -> bool:
        """Whether a call that was answered with `chunks` has a whole answer."""
        self._loop.answering = chunks
        found: bool = self._run(self._ask)
        return found

    def _run(self, work: Callable[[], Any]) -> Any:
        found = self._loop.run_until_complete(work())
        if self._failed:
            failed, self._failed = self._failed, []
            raise AssertionError(failed[0])
        return found

    # ---- as a client

    async def _open(self) -> Client:
        client = Client(1.0)
        client.open()
        return client

    async def _ask(self) -> bool:
        try:
            async with (
                asyncio.timeout(_PATIENCE_S),
                self._client.request("POST", "http://engine:1", "/x", "", b"{}") as exchange,
            ):
                await exchange.read()
                return True
        except (ConnectFailed, Late):
            return False
        except TimeoutError:
            raise AssertionError("a call that never ends") from None
        except Cut as cut:
            if "callback error" in str(cut):  # of ours, which httptools takes for a mistake of the peer's
                raise AssertionError(str(cut)) from cut
            return False

    # ---- as a server

    async def _serve(self, chunks: Sequence[bytes]) -> bytes:
        server, wire = Server(self._edge, api.refused, _LIMITS), Wire()
        connection = Connection(server)
        connection.connection_made(cast("asyncio.BaseTransport", wire))
        left = [chunk for chunk in chunks if chunk]
        for _ in range(_TURNS + len(left)):
            if left and wire.reading and not wire.closed:
                left[0] = _fill(connection, left[0])
                if not left[0]:
                    del left[0]
            elif not connection.busy:
                break
            await asyncio.sleep(0)
        connection.connection_lost(None)
        for _ in range(_TURNS):
            if not connection.busy:
                break
            await asyncio.sleep(0)
        if "<Server 0 connections" not in repr(server):
            raise AssertionError(f"{server!r} {connection!r} after its only client left")
        return bytes(wire.out)

    async def _health(self, request: Request) -> Response:
        return json_response({})

    async def _echo(self, request: Request) -> Response:
        job = openai.parse(await request.read(), Api.CHAT, "id", Identity())
        return json_response({"items": len(job.items), "query": request.query})

    async def _streamed(self, request: Request) -> None:
        request.begin(200, {"content-type": "text/plain"}, None, b"one")
        request.write(b"two")
        request.end()


def _fill(connection: Any, chunk: bytes) -> bytes:
    """Give the connection what it has room for; the rest."""
    place = memoryview(connection.get_buffer(-1))
    taken = min(len(place), len(chunk))
    place[:taken] = chunk[:taken]
    place.release()
    connection.buffer_updated(taken)
    return chunk[taken:]
