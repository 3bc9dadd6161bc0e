"""Questions and answers between transfer layers over TCP. It knows no ticket and moves no tensor bytes.

A frame is four bytes of length, the highest first, and a msgpack message of `messages`. Each asker opens one connection
per process life that it asks, and the answers come back on it. Every wait has a deadline, every queue a bound. A
message that does not parse is counted and dropped, a frame that is too long ends its connection: whoever reaches the
port can send anything. There is no encryption and no login here; what one may do hangs on random ticket ids and
secrets, so keep the port inside the cluster's network.

Plain connections, and no message queue between: on two cores a question takes 0.3 to 0.4 ms, through ZMQ and its
threads 0.9 ms, and a peer's death ends its connection at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec

from engines.transfer.base import (
    Address,
    PeerFailed,
    PeerUnreachable,
    TransferError,
    TransferTimeout,
    TransportUnavailable,
)
from engines.transfer.liveness import here, process_over
from engines.transfer.messages import Peer, Question, Refused, Reply, Request, Response, refusal
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

LENGTH = 4
CONNECT_TIMEOUT = 5.0
MAX_MESSAGE = 64 << 20
MAX_UNSENT = 64 << 20
"""Bytes of questions that a peer has not taken yet."""
BACKLOG = 1024
IDLE_LINK = 60.0

Handler = Callable[[Address, Question], Response | Coroutine[Any, Any, Response]]
"""Decides at once, or returns what will have decided."""


class PeerReplaced(PeerFailed):
    """Another process life answered at the peer's port: the one we knew is over."""


class Frames(asyncio.Protocol):
    """One connection, cut into messages."""

    def __init__(self, garbage: Callable[[], None]) -> None:
        self._garbage = garbage
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def received(self, message: bytes) -> None:
        """Raises msgspec.DecodeError for what is no message."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        # a host that is gone says nothing: the system finds out, and ends the connection
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        buffer, at = self._buffer, 0
        buffer += data
        while len(buffer) - at >= LENGTH:
            begin = at + LENGTH
            end = begin + int.from_bytes(buffer[at:begin], "big")
            if end - begin > MAX_MESSAGE:
                self._garbage()
                self.abort()  # what follows cannot be told from the rest of it
                return
            if len(buffer) < end:
                break
            try:
                self.received(bytes(buffer[begin:end]))
            except msgspec.DecodeError:  # ValidationError is one
                self._garbage()
            at = end
        del buffer[:at]

    def write(self, message: bytes) -> None:
        """Never waits; nothing once the connection is lost."""
        if self._transport is not None:
            self._transport.write(frame(message))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def unsent(self) -> int:
        """Bytes."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(LENGTH, "big") + message


class Link(Frames):
    """Our connection to one process life: questions go out, answers come back."""

    def __init__(self, peer: Address, garbage: Callable[[], None]) -> None:
        super().__init__(garbage)
        self.peer = peer
        self.waiting: dict[int, asyncio.Future[Reply]] = {}
        self.used = 0.0
        self.over = False
        self._early: list[bytes] = []  # questions from before it was open
        self._decoder = msgspec.msgpack.Decoder(Reply)

    async def open(self) -> None:
        """What goes wrong, the questions are told."""
        host, port = self.peer.host.strip("[]"), self.peer.port
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await asyncio.get_running_loop().create_connection(lambda: self, host, port)
        except TimeoutError:
            self.end(PeerUnreachable, f"cannot reach {self.peer}: no connection within {CONNECT_TIMEOUT:g} s")
        except OSError as error:
            self.end(PeerUnreachable, f"cannot reach {self.peer}: {error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.over:
            self.abort()
        early, self._early = self._early, []
        for message in early:
            self.write(message)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end(PeerFailed, f"the control link to {self.peer} was lost: has it stopped, or restarted?")

    def ask(self, message: bytes) -> None:
        """Raises PeerUnreachable."""
        self.used = asyncio.get_running_loop().time()
        if self.unsent + sum(map(len, self._early)) > MAX_UNSENT:
            raise PeerUnreachable(f"{self.peer} takes no more questions: is it stopped?")
        if self._transport is None:
            self._early.append(message)
        else:
            self.write(message)

    def received(self, message: bytes) -> None:
        reply = self._decoder.decode(message)
        future = self.waiting.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)

    def end(self, kind: type[TransferError], why: str) -> None:
        """No more questions; those that wait fail so. Idempotent."""
        self.over = True
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(kind(why))
        self.abort()


class Asker(Frames):
    """A peer's connection to us: `asked` gets its questions."""

    def __init__(self, garbage: Callable[[], None], asked: Callable[[Asker, Request], None]) -> None:
        super().__init__(garbage)
        self._asked = asked
        self._decoder = msgspec.msgpack.Decoder(Request)

    def received(self, message: bytes) -> None:
        self._asked(self, self._decoder.decode(message))

    def pause_writing(self) -> None:
        """Whoever does not take our answers asks no more."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


class Control:
    """`handle` answers a peer's question; a TransferError it raises becomes the refusal."""

    def __init__(self, host: str, advertise: str, handle: Handler) -> None:
        self._host, self._advertise, self._handle = host, advertise, handle
        self._links: dict[str, Link] = {}
        self._askers: weakref.WeakSet[Asker] = weakref.WeakSet()
        self._tasks = Tasks()
        self._ids = itertools.count(1)
        self._encoder = msgspec.msgpack.Encoder()
        self._server: asyncio.Server | None = None
        self.address = Address("", 0, "")
        self.garbage = 0
        """Messages dropped because they did not parse."""

    async def start(self) -> None:
        try:
            listening = await _listening(self._host.strip("[]"))
        except OSError as error:
            raise TransportUnavailable(f"cannot listen for transfer control on {self._host}: {error}") from None
        self._server = await asyncio.get_running_loop().create_server(self._accept, sock=listening)
        self.address = here(self._advertise, listening.getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for link in list(self._links.values()):
            self.drop(link.peer)
        await self._tasks.close()
        for asker in self._askers:
            asker.abort()

    async def request(self, peer: Address, question: Question, *, timeout: float) -> Response:
        """One round trip; `Refused` is an answer too. Raises PeerUnreachable, PeerReplaced, PeerFailed (the link was
        lost, or the process died, meanwhile) or TransferTimeout."""
        link = self._link(peer)
        ident = next(self._ids)
        future = link.waiting[ident] = asyncio.get_running_loop().create_future()
        try:
            link.ask(self._encoder.encode(Request(ident, peer.nonce, Peer.of(self.address), question)))
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError:
            raise TransferTimeout(f"{peer} did not answer a {type(question).__name__} within {timeout:g} s") from None
        finally:
            link.waiting.pop(ident, None)
        return self._unwrap(peer, reply)

    def drop(self, peer: Address, kind: type[TransferError] = PeerUnreachable, why: str = "") -> None:
        """Forget the link to a process life; the next question opens a new one."""
        link = self._links.pop(peer.nonce, None)
        if link is not None:
            link.end(kind, why or f"the control link to {peer} was closed")

    def tick(self) -> None:
        """Look after the links: a dead peer's may seem alive where a child of it holds the connection open."""
        now = asyncio.get_running_loop().time()
        for link in list(self._links.values()):
            if not link.waiting and now - link.used > IDLE_LINK:
                self.drop(link.peer)
            elif link.waiting and process_over(link.peer):
                self.drop(link.peer, PeerFailed, f"the process {link.peer.pid} behind {link.peer} died")

    def _unwrap(self, peer: Address, reply: Reply) -> Response:
        if reply.nonce != peer.nonce:
            self.drop(peer)
            raise PeerReplaced(f"the peer at {peer.host}:{peer.port} restarted")
        return reply.body

    def _link(self, peer: Address) -> Link:
        if self._server is None:
            raise PeerUnreachable("this transfer is closed")
        link = self._links.get(peer.nonce)
        if link is None or link.over:
            if process_over(peer):
                raise PeerUnreachable(f"the process {peer.pid} behind {peer} is gone")
            link = self._links[peer.nonce] = Link(peer, self._count_garbage)
            self._tasks.spawn(link.open())
        return link

    def _count_garbage(self) -> None:
        self.garbage += 1
        logger.debug("dropped a control message that does not parse")

    def _accept(self) -> Asker:
        asker = Asker(self._count_garbage, self._asked)
        self._askers.add(asker)
        return asker

    def _asked(self, asker: Asker, request: Request) -> None:
        body = self._decided(request)
        if isinstance(body, Response):
            self._reply(asker, request, body)
        else:
            self._tasks.spawn(self._answer(asker, request, body))

    def _decided(self, request: Request) -> Response | Coroutine[Any, Any, Response]:
        if request.to != self.address.nonce:
            return Refused("failed", "another process life was meant")
        try:
            return self._handle(request.sender.address(), request.body)
        except Exception as error:  # noqa: BLE001 - the edge: a bug that one peer's question meets must not end the channel
            return _refused(request, error)

    async def _answer(self, asker: Asker, request: Request, body: Coroutine[Any, Any, Response]) -> None:
        try:
            self._reply(asker, request, await body)
        except Exception as error:  # noqa: BLE001 - the edge, as above
            self._reply(asker, request, _refused(request, error))

    def _reply(self, asker: Asker, request: Request, body: Response) -> None:
        asker.write(self._encoder.encode(Reply(request.id, self.address.nonce, body)))


def _refused(request: Request, error: Exception) -> Refused:
    if isinstance(error, TransferError):
        return refusal(error)
    logger.error("failed to answer a %s", type(request.body).__name__, exc_info=error)
    return Refused("failed", "internal error, see the log of the peer")


async def _listening(host: str) -> socket.socket:
    """On a port of the system's choice; `::` takes IPv4 too."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(
        address, family=family, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(), backlog=BACKLOG
    )
