"""`Transfer`, once for all transports that copy memory to memory: a plane, a control channel and the two halves.

It decides nothing: what a receiver promises is in `receiving`, what a sender does in `outbox` and `sending`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, cast

import msgspec

from engines.transfer.base import (
    Address,
    Arena,
    LayoutMismatch,
    PeerFailed,
    Spans,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from engines.transfer.control import Control
from engines.transfer.liveness import Deaths
from engines.transfer.messages import (
    Accepted,
    Answer,
    Ask,
    Claim,
    Close,
    Fetch,
    Granted,
    Offer,
    Peer,
    Question,
    Refused,
    Response,
    Stopped,
    Where,
    as_error,
    parse,
)
from engines.transfer.outbox import Publication, SendingSide
from engines.transfer.plane import Plane
from engines.transfer.receiving import IncomingTicket, ReceivingSide
from engines.transfer.sending import OutgoingPush
from engines.transfer.spans import table, total
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

TICK = 0.25
CLOSE_TIMEOUT = 2.0


class Endpoint:
    """`timeout`: seconds for one control round trip with a peer."""

    carries_kv = True
    durable = False

    def __init__(self, plane: Plane, *, host: str, advertise: str, timeout: float) -> None:
        self.plane = plane
        self.name = plane.name
        self.facts: dict[str, Any] = {}
        self._timeout = timeout
        self._tasks = Tasks()
        self._control = Control(host, advertise, self._answer)
        deaths = self._deaths = Deaths(self._tasks, timeout)
        self._sending = SendingSide(plane, self._control, deaths, timeout)
        self._receiving = ReceivingSide(plane, self._control, self._tasks, deaths, timeout)
        self._started = self._closed = False

    def __repr__(self) -> str:
        held = " ".join(f"{name}={count}" for name, count in self.audit().items() if count)
        return f"<transfer {self.name} {self.address} {held or 'idle'}>"

    @property
    def address(self) -> Address:
        return self._control.address

    def allocate(self, name: str, nbytes: int) -> Arena:
        if self._started:
            raise RuntimeError("arenas are allocated before start: peers learn them once")
        return self.plane.allocate(name, nbytes)

    async def start(self) -> None:
        await self._control.start()
        self._started = True
        self._receiving.facts = self.facts
        try:
            self.plane.start(self.address, self._ask)
        except TransferError:
            await self.close()
            raise
        self._tasks.spawn(self._housekeeping())

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._receiving.close()
        if self._started:
            await self._sending.close(CLOSE_TIMEOUT)
        await self._tasks.close()
        await self._control.close()
        self.plane.close()

    async def publish(
        self,
        key: str,
        arena: Arena,
        spans: Spans,
        *,
        ttl: float | None,
        on_free: Callable[[], None],
        dtype: str = "",
        shape: Sequence[int] = (),
        once: bool = False,
        on_read: Callable[[], None] | None = None,
        promised: bool = False,
    ) -> dict[str, Any]:
        publication = Publication(key, arena, table(spans, arena.nbytes), on_free, once, on_read, promised)
        self._sending.publish(publication, ttl)
        nbytes = total(publication.spans)
        where = Where(self.name, Peer.of(self.address), key, publication.secret, nbytes)
        return cast(dict[str, Any], msgspec.to_builtins(where))

    def fulfil(self, key: str) -> None:
        self._sending.fulfil(key)

    async def restore(self, key: str) -> None:
        pass  # what we publish is in our own memory

    def withdraw(self, key: str) -> None:
        self._sending.withdraw(key)

    def reserve(self, arena: Arena, spans: Spans, *, timeout: float, on_free: Callable[[], None]) -> IncomingTicket:
        return self._receiving.reserve(arena, spans, timeout, on_free)

    async def open(self, offer: Mapping[str, Any], *, timeout: float) -> OutgoingPush:
        parsed = parse(offer, Offer, self.name)
        if self._sending.writes_to(parsed.ticket):
            raise TransferCancelled("this offer is open already: a ticket has one push")
        receiver = parsed.address.address()
        try:
            answer = await self._control.request(receiver, Claim(parsed.ticket), timeout=min(timeout, self._timeout))
            if isinstance(answer, Refused):
                raise as_error(answer)
            if not isinstance(answer, Granted):
                raise PeerFailed(f"the receiver answered a claim with {type(answer).__name__}")
            return self._sending.push(parsed, answer.facts, timeout)
        except (TransferTimeout, LayoutMismatch, PeerFailed, asyncio.CancelledError):
            # the claim was granted or may still arrive: the same link brings this right behind it, or a new one
            self._tasks.spawn(self._disclaim(receiver, parsed.ticket))
            raise

    async def _disclaim(self, receiver: Address, ticket: str) -> None:
        with contextlib.suppress(TransferError):
            close = Close(ticket, "failed", "the sender gave up before it was let in")
            await self._control.request(receiver, close, timeout=self._timeout)

    def audit(self) -> dict[str, int]:
        return self._receiving.audit() | self._sending.audit()

    def _answer(self, peer: Address, question: Question) -> Response | Coroutine[Any, Any, Response]:
        match question:
            case Claim():
                return self._receiving.claim(peer, question.ticket)
            case Close():
                return self._receiving.close_ticket(peer, question)
            case Fetch():
                self._sending.fetch(peer, question)
                return Accepted()
            case Ask():
                return self._asked(question)
            case _:
                return Stopped(self._sending.revoke(peer, question.ticket))

    async def _asked(self, ask: Ask) -> Answer:
        return Answer(await self.plane.answer(ask.body))

    async def _ask(self, peer: Address, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        answer = await self._control.request(peer, Ask(body), timeout=timeout)
        if isinstance(answer, Refused):
            raise as_error(answer)
        if not isinstance(answer, Answer):
            raise PeerFailed(f"the peer answered a question with {type(answer).__name__}")
        return answer.body

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                self._sending.tick()
                self._receiving.tick()
            except Exception:  # the edge: an owner's failing on_free must not end the search for proofs
                logger.exception("housekeeping of the transfer layer failed")
            self._deaths.retain(self._sending.peers() | self._receiving.peers())
            self._control.tick()
