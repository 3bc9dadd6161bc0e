"""The server: listens, counts its connections, ends those that keep it waiting, and stops in good order."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from proxy.http.connection import Connection, Request
from proxy.http.message import HttpError, Response

__all__ = ["Limits", "Request", "Server"]

Handle: TypeAlias = Callable[[Request], Awaitable[Response | None]]
"""Answers a request; None if it did so through the request's own methods. Raises nothing but CancelledError."""

Refuse: TypeAlias = Callable[[HttpError], Response]
"""The answer to what could not be read as a request."""

_BACKLOG = 1024
_SCRATCH = 256 << 10  # what all connections read into by turns: each empties it before the next read
_LARGEST_SWEEP_S = 1.0
_QUIET_S = 0.25  # without a request on any open connection, until those that are idle are closed
_LAST_WORDS_S = 1.0  # for handlers whose time is over


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds a client may take."""

    head_bytes: int = 64 << 10
    body_bytes: int = 256 << 20
    head_seconds: float = 30.0  # from a request's first byte to the end of its head
    idle_seconds: float = 75.0  # between two requests
    body_seconds: float = 60.0  # between two pieces of a body
    write_seconds: float = 300.0  # without taking a byte of its answer

    @property
    def sweep_seconds(self) -> float:
        shortest = min(self.head_seconds, self.idle_seconds, self.body_seconds, self.write_seconds)
        return min(_LARGEST_SWEEP_S, shortest / 4)


class Server:
    """`start` and `stop` once each."""

    def __init__(self, handle: Handle, refuse: Refuse, limits: Limits | None = None) -> None:
        self.handle = handle
        self.refuse = refuse
        self.limits = limits or Limits()
        self.draining = False
        self.late = 0  # requests that came while it drained
        self._tls: ssl.SSLContext | None = None
        self.scratch = memoryview(bytearray(_SCRATCH))
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Server {len(self._connections)} connections, {sum(c.busy for c in self._connections)} busy>"

    async def start(
        self,
        host: str | None = None,
        port: int = 0,
        *,
        sock: socket.socket | None = None,
        reuse_port: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> int:
        """Listen, on `sock` if one is given; the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._tls = tls
        patience = None if tls is None else self.limits.head_seconds
        if sock is not None:
            self._server = await loop.create_server(
                lambda: Connection(self), sock=sock, backlog=_BACKLOG, ssl=tls, ssl_handshake_timeout=patience
            )
        else:
            self._server = await loop.create_server(
                lambda: Connection(self),
                host or None,
                port,
                backlog=_BACKLOG,
                reuse_port=reuse_port or None,
                ssl=tls,
                ssl_handshake_timeout=patience,
            )
        self._sweep(loop)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def drain(self) -> None:
        """From now on each answer is the last of its connection. Requests are served as before, on new ones too."""
        self.draining = True
        for connection in self._connections:
            connection.wind_down()

    async def stop(self, grace: float) -> None:
        """Listen no more. Who has connected is served yet; requests in flight may go on for `grace` seconds. Those that
        are left are cut (`Request.cut`): their handlers are cancelled, and have a second for a last word."""
        self.drain()
        await self._stop_listening()
        await self._until_quiet(grace)
        for connection in list(self._connections):
            connection.leave_idle()
        if not await self._until_empty(grace):
            for connection in list(self._connections):
                connection.cut()
            if not await self._until_empty(_LAST_WORDS_S):
                for connection in list(self._connections):
                    connection.abort()
                await self._until_empty(None)
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _stop_listening(self) -> None:
        """Closing a socket resets those who wait in it to be accepted: they are accepted first, up to the last one."""
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        listening = [sock.dup() for sock in self._server.sockets]
        for sock in self._server.sockets:
            loop.remove_reader(sock.fileno())
        for _ in range(2):  # turns in which asyncio begins what it has accepted; closing the server would lose it
            await asyncio.sleep(0)
        self._server.close()
        accepted: list[socket.socket] = []
        for sock in listening:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    accepted.append(sock.accept()[0])
            sock.close()
        patience = None if self._tls is None else _LAST_WORDS_S
        joining = [
            loop.connect_accepted_socket(lambda: Connection(self), one, ssl=self._tls, ssl_handshake_timeout=patience)
            for one in accepted
        ]
        await asyncio.gather(*joining, return_exceptions=True)  # who leaves meanwhile is nobody's concern

    async def _until_quiet(self, grace: float) -> None:
        """A front may send a request on an idle connection in the moment in which it is closed, and must not send that
        again elsewhere. While requests come, idle ones stay open: each takes one more, which is its last."""
        seen, until = -1, asyncio.get_running_loop().time() + grace
        while seen != self.late and any(not connection.busy for connection in self._connections):
            seen = self.late
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or await self._until_empty(min(left, _QUIET_S)):
                return

    async def _until_empty(self, patience: float | None) -> bool:
        """Until the last connection is closed; False if there are some after `patience` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._connections:
                    self._empty.clear()
                    await self._empty.wait()
        return not self._connections

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """Its socket is closed and its handler has ended."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all connections: a timer per connection and phase costs more than the parsing."""
        now = loop.time()
        for connection in list(self._connections):
            if connection.deadline <= now:
                connection.late()
        self._sweeper = loop.call_later(self.limits.sweep_seconds, self._sweep, loop)
