"""The receiver's half: tickets, who writes into them, and the quarantine of memory that somebody may still write.

a ticket ends badly while its writer lives ─▶ DOOMED / QUARANTINED ─▶ every tick: is the writer's life over?
can our plane shut it out? does the writer say that it stopped? ─▶ settled ─▶ on_free
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
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
from engines.transfer.control import Control, PeerReplaced
from engines.transfer.lifecycle import TicketEvent, TicketState, ticket_machine
from engines.transfer.liveness import Deaths
from engines.transfer.messages import (
    Close,
    Fetch,
    Granted,
    Offer,
    Peer,
    Refused,
    Revoke,
    Stopped,
    Where,
    as_error,
    parse,
)
from engines.transfer.plane import Plane
from engines.transfer.spans import as_list, table, total
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

AT_RISK = (TicketState.DOOMED, TicketState.QUARANTINED)


class IncomingTicket:
    """`Ticket` over a plane. `inbox` is told when nobody can touch the memory any more."""

    def __init__(
        self, inbox: ReceivingSide, arena: Arena, spans: Spans, timeout: float, on_free: Callable[[], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.id = secrets.token_hex(16)
        self.arena, self.spans = arena, table(spans, arena.nbytes)
        self.nbytes = total(self.spans)
        self.writer: Address | None = None
        self.error: TransferError | None = None
        self.lost = False
        self.grace = inbox.plane.grace_ticks
        self.deadline = loop.time() + timeout
        self._inbox, self._on_free = inbox, on_free
        self._machine = ticket_machine()
        self._ended = asyncio.Event()
        self._expiry = loop.call_later(timeout, self._expire)
        self._region: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<ticket {self.id[:8]} {self.state.value} {self.nbytes} bytes>"

    @property
    def state(self) -> TicketState:
        return self._machine.state

    def fire(self, event: TicketEvent, error: TransferError | None = None) -> bool:
        """False, and nothing changes, where the table has no such move."""
        if not self._machine.allows(event):
            return False
        before, after = self.state, self._machine.fire(event)
        self.error = self.error or error
        if after not in (TicketState.RESERVED, TicketState.WRITING):
            self._expiry.cancel()
            self._ended.set()
        if after not in (TicketState.RESERVED, TicketState.WRITING, *AT_RISK) and before is not TicketState.COMPLETE:
            self._inbox.plane.forget(self.id)
        if after is TicketState.FREE:
            self._inbox.forget(self)
            self._on_free()
        elif after in AT_RISK:
            self._inbox.endanger(self)
        return True

    def _expire(self) -> None:
        who = f"{self.writer} did not finish" if self.writer else "nobody claimed the ticket"
        self.fire(TicketEvent.EXPIRE, TransferTimeout(f"the transfer expired: {who}"))

    def wire_offer(self) -> Offer:
        if self._region is None:
            self._region = self._inbox.plane.describe(self.id, self.arena, self.spans)
        return Offer(
            self._inbox.plane.name,
            Peer.of(self._inbox.address),
            self.id,
            self.arena.name,
            self.arena.nbytes,
            as_list(self.spans),
            self._region,
        )

    def offer(self) -> dict[str, Any]:
        return cast(dict[str, Any], msgspec.to_builtins(self.wire_offer()))

    async def fetch(self, where: Mapping[str, Any], *, start: int | None = None, more: bool = False) -> int:
        source = parse(where, Where, self._inbox.plane.name)
        left = left_behind(source.nbytes, start, self.nbytes)
        await self._inbox.fetch(self, source, start, more)
        await self.wait()
        return left

    async def wait(self) -> None:
        await self._ended.wait()
        if self.state is not TicketState.COMPLETE:
            raise self.error or TransferCancelled("the receiver released the ticket")

    def release(self) -> None:
        self.fire(TicketEvent.RELEASE, TransferCancelled("the receiver released the ticket"))


class ReceivingSide:
    """All tickets of one transfer. On the loop."""

    def __init__(self, plane: Plane, control: Control, tasks: Tasks, deaths: Deaths, timeout: float) -> None:
        self.plane = plane
        self.facts: dict[str, Any] = {}
        self._control, self._tasks, self._deaths, self._timeout = control, tasks, deaths, timeout
        self._tickets: dict[str, IncomingTicket] = {}
        self._probing: set[str] = set()

    @property
    def address(self) -> Address:
        return self._control.address

    def audit(self) -> dict[str, int]:
        tickets = self._tickets.values()
        return {
            "tickets": sum(ticket.state is not TicketState.QUARANTINED for ticket in tickets),
            "quarantined_bytes": sum(ticket.nbytes for ticket in tickets if ticket.state in AT_RISK),
        }

    def reserve(self, arena: Arena, spans: Spans, timeout: float, on_free: Callable[[], None]) -> IncomingTicket:
        ticket = IncomingTicket(self, arena, spans, timeout, on_free)
        self._tickets[ticket.id] = ticket
        return ticket

    def forget(self, ticket: IncomingTicket) -> None:
        del self._tickets[ticket.id]

    async def fetch(self, ticket: IncomingTicket, source: Where, start: int | None, more: bool) -> None:
        """Ask the owner; returns when it agreed to write, or has left the ticket in a state that says why not."""
        if not ticket.fire(TicketEvent.CLAIM):
            raise ticket.error or TransferCancelled(f"{ticket!r} cannot fetch: a ticket is used once")
        ticket.writer = source.address.address()
        left = max(0.0, ticket.deadline - asyncio.get_running_loop().time())
        question = Fetch(source.key, source.secret, left, ticket.wire_offer(), start, more)
        try:
            answer = await self._control.request(ticket.writer, question, timeout=min(left, self._timeout))
        except TransferError as error:
            ticket.fire(TicketEvent.LOSE, error)
        else:
            if isinstance(answer, Refused):
                ticket.fire(TicketEvent.FAIL, as_error(answer))

    # -- what writers say

    def claim(self, peer: Address, ticket_id: str) -> Granted:
        """Raises TransferCancelled unless the ticket waits for a writer, or has this one."""
        ticket = self._tickets.get(ticket_id)
        if ticket is not None and ticket.fire(TicketEvent.CLAIM):
            ticket.writer = peer
        elif ticket is None or ticket.state is not TicketState.WRITING or ticket.writer != peer:
            raise TransferCancelled("the ticket is not open: it expired, was released, or has another writer")
        return Granted(self.facts)

    def close_ticket(self, peer: Address, close: Close) -> Stopped:
        ticket = self._tickets.get(close.ticket)
        if ticket is None or ticket.writer is None or ticket.writer.nonce != peer.nonce:
            if close.outcome == "done":
                raise TransferCancelled("the receiver has given this ticket up")
            return Stopped(settled=True)
        if close.outcome == "lost":
            ticket.lost = True
            ticket.fire(TicketEvent.LOSE, PeerFailed(close.reason))
            return Stopped(settled=self._shut_out(ticket))
        done = close.outcome == "done"
        moved = ticket.fire(TicketEvent.DONE) if done else ticket.fire(TicketEvent.FAIL, PeerFailed(close.reason))
        if not moved:
            ticket.fire(TicketEvent.SETTLE)
        if done and ticket.state is not TicketState.COMPLETE:
            raise TransferCancelled(f"the receiver has given this ticket up: {ticket.error}")
        return Stopped(settled=True)

    # -- quarantine

    def endanger(self, ticket: IncomingTicket) -> None:
        """Somebody may still write into it: find the proof that they do not, now and at every tick."""
        if ticket.id not in self._probing:
            self._probing.add(ticket.id)
            self._tasks.spawn(self._probe(ticket))

    def tick(self) -> None:
        for ticket in list(self._tickets.values()):
            if ticket.state in AT_RISK:
                self.endanger(ticket)
            elif ticket.state is TicketState.WRITING and ticket.writer and self._deaths.over(ticket.writer):
                ticket.fire(TicketEvent.LOSE, PeerFailed(f"the sender {ticket.writer} died"))

    def peers(self) -> set[str]:
        return {ticket.writer.nonce for ticket in self._tickets.values() if ticket.writer}

    async def _probe(self, ticket: IncomingTicket) -> None:
        try:
            self._shut_out(ticket)  # and tell the writer in any case, so that it stops
            if await self._stopped(ticket):
                ticket.fire(TicketEvent.SETTLE)
        finally:
            self._probing.discard(ticket.id)

    def _shut_out(self, ticket: IncomingTicket) -> bool:
        if ticket.state in AT_RISK and self.plane.revoke(ticket.id, ticket.lost):
            ticket.fire(TicketEvent.SETTLE)
        return ticket.state not in AT_RISK

    async def _stopped(self, ticket: IncomingTicket) -> bool:
        """The writer says so, or has been dead for the transport's grace."""
        assert ticket.writer is not None
        if self._deaths.over(ticket.writer):
            ticket.grace -= 1
            return ticket.grace < 0
        try:
            answer = await self._control.request(ticket.writer, Revoke(ticket.id), timeout=self._timeout)
        except PeerReplaced:
            self._deaths.note(ticket.writer)
        except TransferError as error:
            logger.info("%r stays in quarantine: %s", ticket, error)
        else:
            return isinstance(answer, Stopped) and answer.settled
        return False

    def close(self) -> None:
        """End every wait; what may still be written stays in quarantine for good."""
        for ticket in list(self._tickets.values()):
            ticket.fire(TicketEvent.EXPIRE, TransferCancelled("the receiver is shutting down"))


def left_behind(published: int, start: int | None, wanted: int) -> int:
    """How many of so many published bytes come after the `wanted` ones from `start` on, or after all of them.

    Raises LayoutMismatch if these are not there, or not all where they must be.
    """
    left = published - (start or 0) - wanted
    if left < 0 or (start is None and left):
        raise LayoutMismatch(f"{published} bytes are published, the ticket holds {wanted} from byte {start or 0} on")
    return left
