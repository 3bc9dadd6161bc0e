"""HTTP to engines: a pool of connections per engine, one exchange at a time on each. Retries nothing.

A connection that stayed idle too long, or that the engine closed, is never used again: nothing is sent on it. Leaving
an exchange before its end closes its connection at once: so an engine learns that nobody waits for its answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Self, TypeAlias, cast
from urllib.parse import urlsplit

import httptools

from proxy.http.message import Buffer, Headers, size

# An idle connection is closed by us before uvicorn (5 s) does: a POST on a connection that the engine is closing
# fails, and must not be repeated blindly.
_KEEPALIVE_S = 2.5
_HIGH = 256 << 10  # bytes of an answer held for a reader who is slower than the engine
_DRAIN_S = 1.0  # for the end of an answer of which enough was read, so that its connection can be used again
_CLOSE_S = 1.0
_LOOK_S = 0.05  # how late an exchange may find that its patience has ended
_WHOLE_LIMIT = 256 << 20
_HEAD_LIMIT = 256 << 10  # bytes of an answer that belong to no body: head, interim answers, trailers, sizes of chunks
_SMALL = 16 << 10  # a body up to this is copied behind its head, to be one buffer
_FRAMED = ("content-length", "transfer-encoding")
_PLAIN = re.compile(rb"HTTP/1\.1 200 [ -~]*((?:\r\n[A-Za-z0-9-]+: [!-~][ -~]*){1,64}\r\n)\r\n")
_NEVER = float("inf")

Feed: TypeAlias = Callable[[bytes], None]
"""Gets each piece of an answer as it arrives, and the empty one at its end."""

Shortcut: TypeAlias = Callable[[bytes], bool]
"""Gets what was read from the socket while between two chunks of a body. True: it was whole chunks, written as
HTTP writes them, and has been dealt with; False: nothing was done with it, and it is parsed."""


Resolve: TypeAlias = Callable[[str, int], Awaitable[str]]
"""The address to connect to for a host and port. Raises OSError where there is none."""


class ConnectFailed(Exception):
    """No connection: nothing was sent."""


class Cut(Exception):
    """The connection ended, or spoke no HTTP, before the answer was whole. `begun`: its head had come."""

    def __init__(self, why: str, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class Late(Exception):
    """The patience with the engine has ended."""


class Exchange:
    """One request and its answer: `async with` sends the one, and begins once the head of the other is there.

    Raises what `named` makes of ConnectFailed, Cut and Late, wherever the answer is waited for.
    """

    __slots__ = (
        *("_body", "_client", "_connection", "_feed", "_fields", "_head", "_held", "_held_bytes", "_idle", "_loop"),
        *("_lost", "_method", "_path", "_url", "_waiter", "_whole", "deadline", "done", "enough", "error", "headers"),
        "status",
    )

    def __init__(
        self, client: Client, method: str, url: str, path: str, fields: str, body: Buffer | list[Buffer]
    ) -> None:
        self._client = client
        self._method = method
        self._url = url
        self._path = path
        self._fields = fields
        self._body = body
        self._loop = client.loop
        self._connection: _Connection | None = None
        self.status = 0  # 0: the head is not there yet
        self.headers: Headers | None = None  # None: not there yet, or `_head` still has them
        self._head = b""
        self.done = False  # the answer is whole
        self.enough = False  # what may still come is of no interest
        self.error: Cut | Late | None = None
        self.deadline = _NEVER  # of the loop's time
        self._idle = 0.0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._whole = False  # someone waits for the end, so holding the answer is wanted
        self._feed: Feed | None = None
        self._lost: Callable[[Exception], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status} done={self.done} held={self._held_bytes} error={self.error}>"

    def named(self, error: ConnectFailed | Cut | Late) -> Exception:
        """What is raised for `error`."""
        return error

    def header(self, name: str) -> str:
        """A field of the answer's head by its lower-case name; empty if it has none."""
        if self.headers is None:
            lines = [line.partition(":") for line in self._head.decode("latin-1").split("\r\n")[1:-2]]
            self.headers = Headers({name.lower(): value.strip() for name, _, value in lines})
        return self.headers.get(name, "")

    def patience(self, seconds: float | None, *, each: bool = False) -> None:
        """From now on the engine may take so long for its whole answer, or for `each` next piece of it. None: for ever.

        Time in which `pause` keeps it from sending a next piece does not count.
        """
        self.deadline = _NEVER if seconds is None else self._loop.time() + seconds
        self._idle = seconds if each and seconds is not None else 0.0

    async def __aenter__(self) -> Self:
        client, body = self._client, self._body
        origin = client.origin(self._url)
        connection = origin.take(self._loop.time()) or await client.connect(origin, self)
        length = "" if self._method == "GET" else f"content-length: {size(body)}\r\n"
        head = f"{self._method} {origin.prefix}{self._path} HTTP/1.1\r\n{origin.host_line}{length}{self._fields}\r\n"
        self._connection, self._body = connection, b""
        client.busy.add(self)
        client.watch()
        try:
            connection.send(self, head.encode("latin-1", "replace"), body)
            del body  # what was sent is not kept while the answer is waited for
            while not self.status:
                await self._wait()
        except BaseException:
            client.busy.discard(self)
            connection.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.busy.discard(self)
        self._feed = self._lost = None  # whose owners have this: no circle may keep what they hold until it is found
        if self._connection is not None:
            self._connection.release(self._loop)

    async def read(self, limit: int = _WHOLE_LIMIT) -> bytes:
        """The whole body, or its first `limit` bytes and some."""
        if not self.done:
            self._whole = True
            self.resume()
            while not self.done and self._held_bytes < limit:
                await self._wait()
        return self._taken()

    async def chunk(self) -> bytes:
        """What has arrived; empty at the end."""
        while not self._held and not self.done:
            await self._wait()
        data = self._taken()
        self.resume()
        return data

    def shortcut(self, shortcut: Shortcut | None) -> None:
        """From now on ask `shortcut` first where it can be, before a piece goes where `pipe` says."""
        if self._connection is not None:
            self._connection.shortcut = shortcut

    def pipe(self, feed: Feed, lost: Callable[[Exception], None]) -> None:
        """From now on call `feed` with every piece in the moment it arrives, and first with what has.

        If the answer breaks off, `lost` is called instead of `feed`'s end.
        """
        if self._held:
            feed(self._taken())
        self._feed, self._lost = feed, lost
        self.resume()
        if self.done:
            feed(b"")
        elif self.error is not None:
            lost(self.named(self.error))

    async def end(self) -> None:
        """Wait until the answer is whole."""
        while not self.done:
            await self._wait()

    def pause(self) -> None:
        """Read no more for now: whom it is for is slower than the engine."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def _taken(self) -> bytes:
        held, self._held, self._held_bytes = self._held, [], 0
        return held[0] if len(held) == 1 else b"".join(held)

    async def _wait(self) -> None:
        if self.error is not None:
            raise self.named(self.error)  # a new one: its traceback has this exchange, which must not have it in turn
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # ---- called by the connection

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def got(self, data: bytes) -> None:
        if self.enough:
            return
        if self._feed is not None:
            self._feed(data)
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _HIGH and not self._whole:
            self.pause()
        if not self._whole or self._held_bytes > _WHOLE_LIMIT:
            self.wake()

    def ended(self) -> None:
        self.done = True
        if self._feed is not None and not self.enough:
            self._feed(b"")
        self.wake()

    def came_whole(self, head: bytes, body: bytes) -> None:
        """All of an answer with status 200, in one read."""
        self.status, self.done, self._head = 200, True, head
        self._held.append(body)
        self.wake()

    def failed(self, error: Cut | Late) -> None:
        if not self.done and self.error is None:
            self.error = error
            if self._lost is not None:
                self._lost(self.named(error))
            self.wake()

    def look(self, now: float) -> None:
        """Whether the engine has taken too long."""
        connection = self._connection
        if connection is None or self.deadline == _NEVER:
            return
        if not connection.reading or (connection.heard and self._idle):
            connection.heard = False
            if self._idle:
                self.deadline = now + self._idle
        elif self.deadline <= now:
            self.deadline = _NEVER
            self.failed(Late())


class _Connection(asyncio.Protocol):
    """llhttp's callbacks and the transport's, for the one exchange on it."""

    def __init__(self, pool: _Origin) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._exchange: Exchange | None = None
        self._interim = False  # a 1xx answer is being read
        self._fresh = False  # nothing has come yet
        self._between = False  # two chunks
        self._bare = 0  # bytes since the last of a body
        self.shortcut: Shortcut | None = None
        self._draining: asyncio.TimerHandle | None = None
        self._abandoned = False
        self._reusable = True
        self.reading = True
        self.heard = False  # something came since this was last set back
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange, head: bytes, body: Buffer | list[Buffer]) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._reusable = self._fresh = True
        self._between = self.heard = False
        self._bare = 0
        if isinstance(body, list):
            self._transport.writelines([head, *body])
        elif len(body) <= _SMALL:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def release(self, loop: asyncio.AbstractEventLoop) -> None:
        """The exchange is over for its owner: keep the connection if the next exchange can have it."""
        exchange, self.shortcut = self._exchange, None
        if self._transport is None or exchange is None:
            self._exchange = None
        elif exchange.enough and not exchange.done:
            self.resume()
            self._draining = loop.call_later(_DRAIN_S, self.close)
        else:
            self._put_back(exchange, loop)

    def _put_back(self, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
        self._exchange = None
        if self._transport is None:
            return
        pool = self._pool
        usable = exchange.done and self._reusable and not self._transport.get_write_buffer_size()
        if usable and (pool.keeps is None or pool.keeps()):
            self.resume()
            self.idle_since = loop.time()
            pool.idle.append(self)
        else:
            self._transport.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def abandon(self) -> None:
        """Nobody waits for this connection any more, made already or not."""
        self._abandoned = True
        self.close()
        self._pool.closed(self)  # uvloop closes what it had made for a cancelled task without telling connection_lost

    def pause(self) -> None:
        if self.reading and self._transport is not None:
            self.reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self.reading and self._transport is not None and not self._transport.is_closing():
            self.reading = self.heard = True
            self._transport.resume_reading()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._pool.opened(self)
        if self._abandoned:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.closed(self)
        if self._draining is not None:
            self._draining.cancel()
        exchange = self._exchange
        if exchange is None or exchange.done:
            return
        if exc is None and exchange.status and not any(exchange.header(name) for name in _FRAMED):
            exchange.ended()  # RFC 9112 6.3: such a body lasts as long as its connection
        else:
            exchange.failed(Cut("closed" if exc is None else _why(exc), exchange.status != 0))

    def data_received(self, data: bytes) -> None:
        self.heard = True
        if self._between and self.shortcut is not None and self.shortcut(data):
            return
        exchange = self._exchange
        if exchange is None or exchange.done:
            self._reusable = False  # bytes that nobody asked for
            self.close()
            return
        if self._fresh:
            self._fresh = False
            if end := _whole(data):
                exchange.came_whole(data[:end], data[end:])
                return
            if self._parser is None:
                self._parser = httptools.HttpResponseParser(self)
        assert self._parser is not None
        try:
            self._bare += len(data)
            self._parser.feed_data(data)
            if self._bare > _HEAD_LIMIT:
                raise httptools.HttpParserError(f"more than {_HEAD_LIMIT} bytes without any of a body")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            exchange.failed(Cut(f"not HTTP: {error}", exchange.status != 0))
            self.close()

    # ---- httptools

    def on_message_begin(self) -> None:
        if self._exchange is not None:
            self._exchange.headers = Headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None and self._exchange.headers is not None and not self._interim:
            self._exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None:
            return
        status = parser.get_status_code()
        self._interim = status < 200
        if self._interim:
            return
        self._reusable = parser.should_keep_alive()
        exchange.status = status
        exchange.wake()

    def on_body(self, data: bytes) -> None:
        self._bare = 0
        if self._exchange is not None:
            self._exchange.got(data)

    def on_chunk_header(self) -> None:
        self._between = False

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_complete(self) -> None:
        self._between = False
        if self._interim:
            self._interim = False
        elif self._exchange is not None:
            self._exchange.ended()
            if self._draining is not None:
                self._draining.cancel()
                self._draining = None
                self._put_back(self._exchange, asyncio.get_running_loop())


def _whole(data: bytes) -> int:
    """Where the body begins, if `data` is exactly one answer with status 200 on a connection that stays; else 0.

    Most answers are, and need no parser; whatever is unusual in the least is llhttp's to judge.
    """
    found = _PLAIN.match(data)
    if found is None:
        return 0
    end = found.end()
    fields = found[1].lower()
    if (
        fields.count(b"\ncontent-length: ") != 1
        or b"\ncontent-length: %d\r" % (len(data) - end) not in fields
        or b"\ntransfer-encoding:" in fields
        or b"\nconnection:" in fields
    ):
        return 0
    return end


@cache
def system_trust() -> ssl.SSLContext:
    """Read once: the system's certificates take tens of milliseconds."""
    return ssl.create_default_context()


class _Origin:
    """The connections to one engine."""

    def __init__(self, url: str, keeps: Callable[[], bool] | None) -> None:
        """`keeps`: whether one more connection may stay idle; None: each may."""
        parts = urlsplit(url)
        self.keeps = keeps
        self.host = parts.hostname or ""
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/")
        self.authority = parts.netloc.rpartition("@")[2]
        self.host_line = f"host: {self.authority}\r\n"
        self.idle: list[_Connection] = []
        self.open: set[_Connection] = set()
        self.connecting = 0

    def __repr__(self) -> str:
        return f"<Origin {self.authority} {len(self.open)} open, {len(self.idle)} idle>"

    def opened(self, connection: _Connection) -> None:
        self.open.add(connection)

    def closed(self, connection: _Connection) -> None:
        self.open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def take(self, now: float) -> _Connection | None:
        """The connection used last, if it can still be trusted."""
        while self.idle:
            connection = self.idle.pop()
            if connection.usable and now - connection.idle_since < _KEEPALIVE_S:
                return connection
            connection.close()
        return None

    def expire(self, now: float) -> None:
        for connection in [c for c in self.idle if now - c.idle_since >= _KEEPALIVE_S]:
            self.idle.remove(connection)
            connection.close()


class Client:
    """The pools of all engines. `open` and `close` it once each."""

    def __init__(
        self,
        connect_timeout: float,
        resolve: Resolve | None = None,
        tls: Callable[[], ssl.SSLContext] = system_trust,
        idle: int | None = None,
    ) -> None:
        """`resolve`: None leaves names to the system. `tls` is asked for each new connection to an https URL. `idle`:
        how many connections wait for another exchange at the most, for where clients choose the hosts; None: any."""
        self.connect_timeout = connect_timeout
        self._most_idle = idle
        self._resolve = resolve
        self._tls = tls
        self._origins: dict[str, _Origin] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._watcher: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.busy: set[Exchange] = set()

    def __repr__(self) -> str:
        return f"<Client {list(self._origins.values())}>"

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sweep()

    async def close(self) -> None:
        """Close every connection, and wait until they are."""
        for timer in (self._sweeper, self._watcher):
            if timer is not None:
                timer.cancel()
        self._loop = None
        for origin in self._origins.values():
            for connection in list(origin.open):
                connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while any(origin.open for origin in self._origins.values()):  # noqa: ASYNC110 - the next turns do it
                    await asyncio.sleep(0)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("connections open with `async with upstream`")
        return self._loop

    def request(
        self, method: str, url: str, path: str, fields: str = "", body: Buffer | list[Buffer] = b""
    ) -> Exchange:
        """`fields`: whole lines of the head, without Host and Content-Length."""
        return Exchange(self, method, url, path, fields, body)

    # ---- called by exchanges

    def origin(self, url: str) -> _Origin:
        found = self._origins.get(url)
        if found is None:
            found = self._origins[url] = _Origin(url, None if self._most_idle is None else self._keeps)
        return found

    def _keeps(self) -> bool:
        return sum(len(origin.idle) for origin in self._origins.values()) < (self._most_idle or 0)

    async def connect(self, origin: _Origin, exchange: Exchange) -> _Connection:
        """A new connection for `exchange`, in the time that it has."""
        loop = self.loop
        origin.connecting += 1
        connection = _Connection(origin)
        until = loop.time() + self.connect_timeout
        try:
            async with asyncio.timeout_at(min(until, exchange.deadline)) as timer:
                host = origin.host if self._resolve is None else await self._resolve(origin.host, origin.port)
                name, tls = (origin.host, self._tls()) if origin.tls else (None, None)
                await loop.create_connection(lambda: connection, host, origin.port, ssl=tls, server_hostname=name)
        except TimeoutError:
            connection.abandon()
            if not timer.expired():
                raise exchange.named(ConnectFailed("cannot be reached: Connection timed out")) from None
            late = exchange.deadline < until
            raise exchange.named(Late() if late else ConnectFailed("did not accept a connection in time")) from None
        except OSError as error:
            raise exchange.named(ConnectFailed(f"cannot be reached: {_words(error)}")) from None
        except asyncio.CancelledError:
            connection.abandon()
            raise
        finally:
            origin.connecting -= 1
        return connection

    def watch(self) -> None:
        """Look at the deadlines of all exchanges, as long as there are any: one timer for all."""
        if self._watcher is None:
            self._watcher = self.loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._watcher = None
        if self._loop is not None:
            now = self._loop.time()
            for exchange in list(self.busy):
                exchange.look(now)
            if self.busy:
                self.watch()

    def _sweep(self) -> None:
        if self._loop is not None:
            for url, origin in list(self._origins.items()):
                origin.expire(self._loop.time())
                if not origin.open and not origin.connecting:
                    del self._origins[url]  # its engine may have left the fleet
            self._sweeper = self._loop.call_later(_KEEPALIVE_S / 2, self._sweep)


def _why(error: Exception) -> str:
    return _words(error) if isinstance(error, ssl.SSLError) else str(error)


def _words(error: OSError) -> str:
    """The system's words for it, without the address, which the caller names better."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
