"""All of one transfer's sending: publications, pushes, and the senders they share. Receiving is `receiving`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.transfer.base import (
    Address,
    Arena,
    GoneError,
    LayoutMismatch,
    PeerFailed,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from engines.transfer.control import Control, PeerReplaced
from engines.transfer.lifecycle import PushState
from engines.transfer.liveness import Deaths
from engines.transfer.messages import Close, Fetch, Offer, Refused, Stopped, as_error
from engines.transfer.plane import Plane
from engines.transfer.sending import OutgoingPush, PeerSender
from engines.transfer.spans import Table, as_list, part, total
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

REMEMBERED_REVOCATIONS = 65536
GOODBYE = 0.5
"""Seconds for telling receivers, at close, that their pushes have failed."""


@dataclass(slots=True, eq=False)
class Publication:
    """Readers are fetches under way; `on_free` runs when it is withdrawn and the last of them has settled.

    `promised`: its bytes are still to come, and fetches of it are `waiting` for them: none is a reader yet.
    """

    key: str
    arena: Arena
    spans: Table
    on_free: Callable[[], None]
    once: bool
    on_read: Callable[[], None] | None = None
    promised: bool = False
    waiting: list[tuple[OutgoingPush, Fetch]] = field(default_factory=list)
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    readers: int = 0
    withdrawn: bool = False
    expiry: asyncio.TimerHandle | None = None

    def asked(self, fetch: Fetch) -> Table:
        """The bytes that a fetch wants. Raises LayoutMismatch unless they fill what it offers."""
        wanted = sum(length for _, length in fetch.offer.spans)
        spans = self.spans if fetch.start is None else part(self.spans, fetch.start, wanted)
        if total(spans) != wanted:
            raise LayoutMismatch(f"{total(spans)} source bytes do not fill {wanted} target bytes")
        return spans

    def end(self) -> None:
        self.withdrawn = True
        for push, _ in self.waiting:
            push.stop(GoneError(f"{self.key!r} was promised here, and did not come to be"))
            push.release(_nothing)
        if self.expiry is not None:
            self.expiry.cancel()
        self._free_if_unread()

    def read(self) -> None:
        self.readers -= 1
        self._free_if_unread()

    def _free_if_unread(self) -> None:
        if self.withdrawn and self.readers == 0:
            self.on_free()


class SendingSide:
    """Everything here runs on the loop; only the peers' threads write."""

    def __init__(self, plane: Plane, control: Control, deaths: Deaths, timeout: float) -> None:
        self._plane, self._control, self._deaths = plane, control, deaths
        self._tasks = Tasks()
        self._timeout = timeout
        self._asking: set[str] = set()
        self._senders: dict[str, PeerSender] = {}
        self._pushes: dict[str, OutgoingPush] = {}
        self._published: dict[str, Publication] = {}
        self._ending: set[Publication] = set()
        self._revoked: OrderedDict[str, None] = OrderedDict()

    def audit(self) -> dict[str, int]:
        return {"publications": len(self._published) + len(self._ending), "pushes": len(self._pushes)}

    # -- publications

    def publish(self, publication: Publication, ttl: float | None) -> None:
        if publication.key in self._published:
            raise ValueError(f"{publication.key!r} is published already: withdraw it first")
        if ttl is not None:
            loop = asyncio.get_running_loop()
            publication.expiry = loop.call_later(ttl, self._withdraw, publication)
        self._published[publication.key] = publication

    def withdraw(self, key: str) -> None:
        publication = self._published.get(key)
        if publication is not None:
            self._withdraw(publication)

    def _withdraw(self, publication: Publication) -> None:
        if self._published.get(publication.key) is publication:
            del self._published[publication.key]
            if publication.readers:
                self._ending.add(publication)
            publication.end()

    def fulfil(self, key: str) -> None:
        publication = self._published[key]
        publication.promised, waiting = False, publication.waiting
        publication.waiting = []
        for push, fetch in waiting:
            with suppress(TransferCancelled):  # who asked has left
                self._write(publication, push, fetch)

    def fetch(self, peer: Address, fetch: Fetch) -> None:
        """Start to write a publication into the asker's offer, or to wait until there is something to write.

        Raises GoneError, LayoutMismatch, TransferCancelled.
        """
        publication = self._published.get(fetch.key)
        if publication is None or not secrets.compare_digest(publication.secret, fetch.secret):
            raise GoneError(f"{fetch.key!r} is not published here any more")
        if fetch.offer.ticket in self._revoked:
            raise TransferCancelled("the ticket was revoked before this fetch arrived")
        if fetch.offer.ticket in self._pushes:
            return
        if peer.nonce != fetch.offer.address.nonce:
            raise LayoutMismatch("an offer fetches only for the process that made it")
        publication.asked(fetch)
        push = self.push(fetch.offer, {}, fetch.timeout)
        if publication.promised:
            publication.waiting.append((push, fetch))
        else:
            self._write(publication, push, fetch)

    def _write(self, publication: Publication, push: OutgoingPush, fetch: Fetch) -> None:
        try:
            push.write(publication.arena, as_list(publication.asked(fetch)), fetch.offer.spans)
        except (LayoutMismatch, TransferCancelled):
            push.release(_nothing)
            raise
        publication.readers += 1
        self._tasks.spawn(self._serve(publication, push, fetch.more))

    async def _serve(self, publication: Publication, push: OutgoingPush, more: bool) -> None:
        try:
            await push.finish()
            if more:
                return
            if publication.on_read is not None:
                publication.on_read()
            if publication.once:
                self._withdraw(publication)
        except TransferError as error:
            logger.info("could not serve %r to %s: %s", publication.key, push.peer, error)
        finally:
            push.release(lambda: self._read(publication))

    def _read(self, publication: Publication) -> None:
        publication.read()
        if publication.readers == 0:
            self._ending.discard(publication)

    # -- pushes

    def push(self, offer: Offer, facts: Mapping[str, Any], timeout: float) -> OutgoingPush:
        """A push for a ticket that is claimed already."""
        peer = offer.address.address()
        sender = self._senders.get(peer.nonce)
        if sender is None:
            sender = self._senders[peer.nonce] = PeerSender(self._plane, peer, self._timeout)
        push = OutgoingPush(self, sender, offer, facts, time.monotonic() + timeout)
        self._pushes[push.ticket] = push
        return push

    def writes_to(self, ticket: str) -> bool:
        return ticket in self._pushes

    def revoke(self, peer: Address, ticket: str) -> bool:
        """The receiver wants no more; True once nothing of ours can arrive in the ticket."""
        self._revoked[ticket] = None
        if len(self._revoked) > REMEMBERED_REVOCATIONS:
            self._revoked.popitem(last=False)
        push = self._pushes.get(ticket)
        if push is None or push.peer.nonce != peer.nonce:
            return True
        push.stop(TransferCancelled("the receiver released the ticket"))
        return push.settled

    async def deliver(self, push: OutgoingPush) -> None:
        await self._close_ticket(push, Close(push.ticket, "done"), max(0.0, push.deadline - time.monotonic()))

    def conclude(self, push: OutgoingPush) -> None:
        self._tasks.spawn(self._conclude(push))

    async def _conclude(self, push: OutgoingPush) -> None:
        await push.drained()
        if not push.lost:  # lost ones are told, and asked about, every tick
            await self._report(push, "failed")

    def settled(self, push: OutgoingPush) -> None:
        self._pushes.pop(push.ticket, None)

    def spawn(self, work: Coroutine[Any, Any, TransferError | None]) -> asyncio.Task[TransferError | None]:
        return self._tasks.spawn(work)

    async def _close_ticket(self, push: OutgoingPush, close: Close, timeout: float) -> bool:
        """True if the receiver says that no byte of ours can arrive any more. Raises what it refuses with."""
        answer = await self._control.request(push.peer, close, timeout=min(timeout, self._timeout))
        if isinstance(answer, Refused):
            raise as_error(answer)
        return isinstance(answer, Stopped) and answer.settled

    # -- housekeeping

    def tick(self) -> None:
        now = time.monotonic()
        for push in list(self._pushes.values()):
            if push.state is PushState.UNSETTLED:
                self._try_to_settle(push)
            elif self._deaths.over(push.peer):
                push.stop(PeerFailed(f"the receiver {push.peer} died"))
            elif now > push.deadline:
                push.stop(TransferTimeout(f"the push to {push.peer} did not end before its deadline"))
        busy = self.peers()
        self._senders = {nonce: sender for nonce, sender in self._senders.items() if nonce in busy or not sender.idle}

    def peers(self) -> set[str]:
        return {push.peer.nonce for push in self._pushes.values()}

    def _try_to_settle(self, push: OutgoingPush) -> None:
        if self._deaths.over(push.peer):
            push.settle()
        elif push.ticket not in self._asking:
            self._asking.add(push.ticket)
            self._tasks.spawn(self._ask_to_settle(push))

    async def _ask_to_settle(self, push: OutgoingPush) -> None:
        try:
            if await self._report(push, "lost"):
                push.settle()
        finally:
            self._asking.discard(push.ticket)

    async def _report(self, push: OutgoingPush, outcome: Literal["failed", "lost"]) -> bool:
        try:
            return await self._close_ticket(push, Close(push.ticket, outcome, str(push.error)[:4096]), self._timeout)
        except PeerReplaced:
            self._deaths.note(push.peer)
        except TransferError as error:
            logger.info("could not tell %s that a push failed: %s", push.peer, error)
        return False

    async def close(self, timeout: float) -> None:
        """Stop every push, give the running writes `timeout` seconds to end, end the threads."""
        for key in list(self._published):
            self.withdraw(key)
        for push in list(self._pushes.values()):
            push.stop(TransferCancelled("the sender is shutting down"))
        senders, self._senders = list(self._senders.values()), {}
        await asyncio.gather(*(asyncio.to_thread(sender.close, timeout) for sender in senders))
        await self._tasks.finish(GOODBYE)
        await self._tasks.close()


def _nothing() -> None:
    pass
