"""`python -m bench.scripted.bare --prefill URL --decode URL --port N`: a relay that decides nothing, until SIGTERM.

Each request goes to the one prefill engine, then to the one decode engine, whose answer is the client's, byte for byte.
Nothing is parsed but where a head and a body end; nothing is chosen, counted, logged or bounded in time, and an engine
that fails ends the client's connection. No proxy to use: it shows what asyncio and uvloop cost before a proxy does
anything, which is the floor of `bench.overhead`'s figures.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import uvloop

from bench.scripted.framing import HEAD_END

# What a prefill engine must not do for a stream is to stream: a key that comes twice has the value that comes last.
_PREFILL_ONLY = b',"stream":false}'
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Message:
    """Bytes of one HTTP message with a length or in chunks, until it is whole.

    Leaner than `framing`, which takes every chunk apart: what that costs would count as asyncio's.
    """

    def __init__(self) -> None:
        self._head = b""  # as far as it has come
        self._missing: int | None = None  # bytes of a body with a length
        self._end: bytes | None = None  # of a body in chunks, its last bytes

    def feed(self, data: bytes) -> bool:
        """Whether the message is whole now."""
        if self._missing is not None:
            self._missing -= len(data)
            return self._missing <= 0
        if self._end is None:
            self._head += data
            head, end, data = self._head.partition(HEAD_END)
            if not end:
                return False
            _, named, value = head.lower().partition(b"content-length:")
            if named:
                self._missing = int(value.split(b"\r\n", 1)[0]) - len(data)
                return self._missing <= 0
            self._end = b"\r\n"
        self._end = (self._end + data)[-len(_LAST_CHUNK) :]
        return self._end == _LAST_CHUNK


class Engine(asyncio.Protocol):
    """A connection to one, and the answer that comes on it now."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._message = Message()
        self._take: Callable[[bytes, bool], None] | None = None

    def ask(self, request: bytes, take: Callable[[bytes, bool], None]) -> None:
        """`take` is called with each piece of the answer, and whether it is the last."""
        assert self._transport is not None
        self._message, self._take = Message(), take
        self._transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._tell(data, self._message.feed(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell(b"", True)

    def _tell(self, data: bytes, last: bool) -> None:
        take = self._take
        if last:
            self._take = None
        if take is not None:
            take(data, last)


class Engines:
    """The connections to the engine at `url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self.idle: list[Engine] = []

    async def take(self) -> Engine:
        if self.idle:
            return self.idle.pop()
        _, engine = await asyncio.get_running_loop().create_connection(Engine, *self._address)
        return engine


class Client(asyncio.Protocol):
    """One of a client's connections, with one request after the other on it."""

    def __init__(self, prefill: Engines, decode: Engines) -> None:
        self._prefill = prefill
        self._decode = decode
        self._transport: asyncio.Transport | None = None
        self._message = Message()
        self._request = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._request += data
        if self._message.feed(data):
            request, self._request, self._message = self._request, b"", Message()
            self._task = asyncio.get_running_loop().create_task(self._serve(request))

    async def _serve(self, request: bytes) -> None:
        await self._prefilled(request)
        engine = await self._decode.take()

        def answer(data: bytes, last: bool) -> None:
            if self._transport is not None and data:
                self._transport.write(data)
            if last and data:
                self._decode.idle.append(engine)
            elif last and self._transport is not None:
                self._transport.abort()

        engine.ask(request, answer)

    async def _prefilled(self, request: bytes) -> None:
        done = asyncio.get_running_loop().create_future()
        engine = await self._prefill.take()
        engine.ask(_for_prefill(request), lambda _, last: done.set_result(None) if last else None)
        await done
        self._prefill.idle.append(engine)


def _for_prefill(request: bytes) -> bytes:
    head, end, body = request.partition(HEAD_END)
    body = body.rstrip()[:-1] + _PREFILL_ONLY
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body)]) + end + body


async def serve(prefill: str, decode: str, port: int) -> None:
    engines = Engines(prefill), Engines(decode)
    server = await asyncio.get_running_loop().create_server(lambda: Client(*engines), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scripted.bare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.prefill, arguments.decode, arguments.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
