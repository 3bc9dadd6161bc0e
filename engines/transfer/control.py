"""Questions and answers between transfer layers over ZMQ. It knows no ticket and moves no tensor bytes.

One ROUTER takes questions; one DEALER per peer asks them. Every wait has a deadline, every queue a bound, nothing
lingers. A message that does not parse is counted and dropped: whoever reaches the port can send anything. There is no
encryption and no login here; what one may do hangs on random ticket ids and secrets, so keep the port inside the
cluster's network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from engines.transfer.base import (
    Address,
    PeerFailed,
    PeerUnreachable,
    TransferError,
    TransferTimeout,
    TransportUnavailable,
)
from engines.transfer.liveness import here, process_over
from engines.transfer.messages import Ask, Peer, Question, Refused, Reply, Request, Response, refusal
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

HIGH_WATER = 1000
MAX_MESSAGE = 64 << 20
LIVENESS_CHECK = 0.1
IDLE_LINK = 60.0

Handler = Callable[[Address, Question], Awaitable[Response]]


class PeerReplaced(PeerFailed):
    """Another process life answered at the peer's port: the one we knew is over."""


class Link:
    """Our DEALER to one process life."""

    def __init__(self, context: zmq.asyncio.Context, peer: Address) -> None:
        self.peer = peer
        self.socket = _socket(context, zmq.DEALER, peer.host)
        self.socket.connect(f"tcp://{_bracket(peer.host)}:{peer.port}")
        self.waiting: dict[int, asyncio.Future[Reply]] = {}
        self.used = asyncio.get_running_loop().time()

    async def listen(self, garbage: Callable[[], None]) -> None:
        decoder = msgspec.msgpack.Decoder(Reply)
        while True:
            frames = await self.socket.recv_multipart()
            try:
                reply = decoder.decode(frames[-1])
            except (msgspec.DecodeError, msgspec.ValidationError):
                garbage()
                continue
            future = self.waiting.get(reply.id)
            if future is not None and not future.done():
                future.set_result(reply)

    def close(self) -> None:
        self.socket.close(linger=0)
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(PeerUnreachable(f"the control link to {self.peer} was closed"))


class Control:
    """`handle` answers a peer's question; a TransferError it raises becomes the refusal."""

    def __init__(self, host: str, advertise: str, handle: Handler) -> None:
        self._host, self._advertise, self._handle = host, advertise, handle
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}
        self._tasks = Tasks()
        self._ids = itertools.count(1)
        self._encoder = msgspec.msgpack.Encoder()
        self._context: zmq.asyncio.Context | None = None
        self._router: zmq.asyncio.Socket | None = None
        self.address = Address("", 0, "")
        self.garbage = 0
        """Messages dropped because they did not parse."""

    async def start(self) -> None:
        self._context = zmq.asyncio.Context()
        self._router = _socket(self._context, zmq.ROUTER, self._host)
        try:
            port = self._router.bind_to_random_port(f"tcp://{_bracket(self._host)}")
        except zmq.ZMQError as error:
            await self.close()
            raise TransportUnavailable(f"cannot listen for transfer control on {self._host}: {error}") from None
        self.address = here(self._advertise, port)
        self._tasks.spawn(self._serve(self._router))

    async def close(self) -> None:
        await self._tasks.close()
        for link, _ in self._links.values():
            link.close()
        self._links.clear()
        if self._router is not None:
            self._router.close(linger=0)
            self._router = None
        if self._context is not None:
            self._context.term()
            self._context = None

    async def request(self, peer: Address, question: Question, *, timeout: float) -> Response:
        """One round trip; `Refused` is an answer too. Raises PeerUnreachable, PeerReplaced, PeerFailed (the process
        died meanwhile) or TransferTimeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        link = self._link(peer)
        ident = next(self._ids)
        future: asyncio.Future[Reply] = loop.create_future()
        link.waiting[ident] = future
        link.used = loop.time()
        message = self._encoder.encode(Request(ident, peer.nonce, Peer.of(self.address), question))
        try:
            sent = cast("asyncio.Future[None]", link.socket.send(message))  # waits only at the high-water mark
            sent.add_done_callback(_swallow)
            while not future.done():
                left = deadline - loop.time()
                if left <= 0:
                    raise TransferTimeout(f"{peer} did not answer a {type(question).__name__} within {timeout:g} s")
                await asyncio.wait({future}, timeout=min(LIVENESS_CHECK, left))
                if not future.done() and process_over(peer):
                    self.drop(peer)
                    raise PeerFailed(f"the process {peer.pid} behind {peer} died")
            return self._unwrap(peer, future.result())
        finally:
            link.waiting.pop(ident, None)
            if not future.done():
                future.cancel()

    def drop(self, peer: Address) -> None:
        """Forget the link to a process life; the next question opens a new one."""
        found = self._links.pop(peer.nonce, None)
        if found is not None:
            link, listener = found
            listener.cancel()
            link.close()

    def drop_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        for link, _ in list(self._links.values()):
            if not link.waiting and now - link.used > IDLE_LINK:
                self.drop(link.peer)

    def _unwrap(self, peer: Address, reply: Reply) -> Response:
        if reply.nonce != peer.nonce:
            self.drop(peer)
            raise PeerReplaced(f"the peer at {peer.host}:{peer.port} restarted")
        return reply.body

    def _link(self, peer: Address) -> Link:
        if self._context is None:
            raise PeerUnreachable("this transfer is closed")
        if peer.nonce not in self._links:
            if process_over(peer):
                raise PeerUnreachable(f"the process {peer.pid} behind {peer} is gone")
            try:
                link = Link(self._context, peer)
            except zmq.ZMQError as error:
                raise PeerUnreachable(f"cannot reach {peer}: {error}") from None
            self._links[peer.nonce] = link, self._tasks.spawn(link.listen(self._count_garbage))
        return self._links[peer.nonce][0]

    def _count_garbage(self) -> None:
        self.garbage += 1
        logger.debug("dropped a control message that does not parse")

    async def _serve(self, router: zmq.asyncio.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(Request)
        while True:
            frames = await router.recv_multipart()
            try:
                request = decoder.decode(frames[-1])
            except (msgspec.DecodeError, msgspec.ValidationError):
                self._count_garbage()
                continue
            answering = self._answer(router, frames[0], request)
            if isinstance(request.body, Ask):
                self._tasks.spawn(answering)
            else:
                await answering  # decided at once: waits for nobody

    async def _answer(self, router: zmq.asyncio.Socket, identity: bytes, request: Request) -> None:
        body = await self._decide(request)
        reply = Reply(request.id, self.address.nonce, body)
        # ROUTER drops what it cannot queue for a peer that went away or does not read
        await router.send_multipart((identity, self._encoder.encode(reply)))

    async def _decide(self, request: Request) -> Response:
        if request.to != self.address.nonce:
            return Refused("failed", "another process life was meant")
        try:
            return await self._handle(request.sender.address(), request.body)
        except TransferError as error:
            return refusal(error)
        except Exception:  # the edge: a bug met by one peer's question must not end the channel
            logger.exception("failed to answer a %s", type(request.body).__name__)
            return Refused("failed", "internal error, see the log of the peer")


def _swallow(sent: asyncio.Future[None]) -> None:
    """A message that could not be sent shows as a reply that does not come."""
    if not sent.cancelled():
        sent.exception()


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _socket(context: zmq.asyncio.Context, kind: int, host: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, HIGH_WATER)
    socket.set(zmq.RCVHWM, HIGH_WATER)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE)
    socket.set(zmq.IPV6, int(":" in host))
    return socket
