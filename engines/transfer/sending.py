"""The sender's half: one thread per peer that writes, and the pushes that queue writes on it.

    model thread / loop            peer's thread                    loop
    push.write ── queue ──▶ plane channel.write, in order
    last, finish ─ queue ─▶ flush ──────────────────▶ drained ─▶ "done" to the receiver

A push's state says only whether its source bytes may still be read; the table is in `lifecycle`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
from engines.transfer.lifecycle import PushEvent, PushState, push_machine
from engines.transfer.messages import Offer
from engines.transfer.plane import Channel, Plane, Unsettled
from engines.transfer.spans import Moves, Region, pair, table

logger = logging.getLogger(__name__)

IDLE_THREAD = 30.0


@dataclass(frozen=True, slots=True)
class Write:
    push: OutgoingPush
    source: Arena
    moves: Moves
    ready: Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class Flush:
    """Everything queued before it has been dealt with."""

    push: OutgoingPush


class PeerSender:
    """One peer's thread and channel. A hung peer holds up this thread and no other."""

    def __init__(self, plane: Plane, peer: Address, timeout: float) -> None:
        self.peer = peer
        self._plane, self._timeout = plane, timeout
        self._queue: queue.SimpleQueue[Write | Flush | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, job: Write | Flush) -> None:
        with self._lock:
            self._queue.put(job)
            if self._thread is None:
                # daemon: a thread stuck in a foreign library must not keep the process from exiting
                self._thread = threading.Thread(target=self._run, name=f"transfer-{self.peer}", daemon=True)
                self._thread.start()

    @property
    def idle(self) -> bool:
        return self._thread is None

    def close(self, timeout: float) -> None:
        """End the thread after what is queued; wait at most `timeout` seconds."""
        with self._lock:
            thread = self._thread
            self._queue.put(None)
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        channel: Channel | None = None
        while (job := self._next()) is not None:
            if isinstance(job, Flush):
                job.push.flushed()
            elif not job.push.halted:
                channel = self._write(channel, job)
        if channel is not None:
            channel.close()

    def _next(self) -> Write | Flush | None:
        try:
            return self._queue.get(timeout=IDLE_THREAD)
        except queue.Empty:
            pass
        with self._lock:
            if self._queue.empty():
                self._thread = None
                return None
        return self._queue.get()

    def _write(self, channel: Channel | None, job: Write) -> Channel | None:
        """The channel for the next write, None after one that must not be used again."""
        push = job.push
        try:
            push.check()
            if channel is None:
                channel = self._plane.connect(self.peer, min(self._timeout, push.deadline - time.monotonic()))
            if job.ready is not None:
                job.ready()
            channel.write(job.source, push.region, job.moves, push)
        except TransferError as error:
            push.failed(error, lost=False)
        except Unsettled as error:
            push.failed(PeerFailed(f"a write to {self.peer} did not settle: {error}"), lost=True)
            return self._discard(channel)
        except Exception as error:
            # the edge of the worker: an unknown error says nothing about what still moves
            logger.exception("a write to %s failed", self.peer)
            push.failed(PeerFailed(f"a write to {self.peer} failed: {error}"), lost=True)
            return self._discard(channel)
        return channel

    @staticmethod
    def _discard(channel: Channel | None) -> None:
        if channel is not None:
            channel.close()


class Outbox(Protocol):
    """What a push needs from the owner of all pushes. On the loop."""

    async def deliver(self, push: OutgoingPush) -> None:
        """Tell the receiver that all is there. Raises TransferError."""

    def conclude(self, push: OutgoingPush) -> None:
        """Once the push has drained, tell the receiver that it failed, as well as that can be done."""

    def settled(self, push: OutgoingPush) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, TransferError | None]) -> asyncio.Task[TransferError | None]:
        """Runs until all is closed, at the latest."""


class OutgoingPush:
    """`Push` over a plane; also the `Halt` of its running write."""

    def __init__(
        self, outbox: Outbox, sender: PeerSender, offer: Offer, facts: Mapping[str, Any], deadline: float
    ) -> None:
        self.ticket, self.peer, self.facts, self.deadline = offer.ticket, sender.peer, facts, deadline
        self.region: Mapping[str, Any] = offer.region
        self.target = table(offer.spans, offer.arena_nbytes, "offered arena")
        self.error: TransferError | None = None
        self.lost = False
        self._outbox, self._sender = outbox, sender
        self._target_nbytes = offer.arena_nbytes
        self._granted = Region(self.target)
        self._machine = push_machine()
        self._loop = asyncio.get_running_loop()
        self._drained: asyncio.Future[None] = self._loop.create_future()
        self._lock = threading.Lock()
        self._closed = False  # takes no more writes
        self._delivery: asyncio.Task[TransferError | None] | None = None
        self._on_free: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<push {self.ticket[:8]} to {self.peer} {self.state.value}>"

    @property
    def state(self) -> PushState:
        return self._machine.state

    @property
    def settled(self) -> bool:
        return self.state is PushState.SETTLED

    # -- any thread

    def write(
        self, arena: Arena, source: Spans, target: Spans, ready: Callable[[], None] | None = None, last: bool = False
    ) -> None:
        goal = table(target, self._target_nbytes, "receiver's arena")
        moves = pair(table(source, arena.nbytes), goal)
        if not self._granted.holds(goal):
            raise LayoutMismatch("the write goes outside the spans that the receiver offered")
        with self._lock:
            if self._closed:
                raise TransferCancelled(f"{self!r} takes no more writes")
            self._sender.put(Write(self, arena, moves, ready))
            if last:
                self._loop.call_soon_threadsafe(self._complete)
                self._close()

    @property
    def halted(self) -> bool:
        return self.error is not None

    def check(self) -> None:
        if self.error is not None:
            raise self.error
        if time.monotonic() > self.deadline:
            raise TransferTimeout(f"the push to {self.peer} did not end before its deadline")

    # -- the peer's thread

    def failed(self, error: TransferError, *, lost: bool) -> None:
        self.error = self.error or error
        self.lost = self.lost or lost

    def flushed(self) -> None:
        self._loop.call_soon_threadsafe(self._drain)

    # -- the loop

    def _drain(self) -> None:
        self._fire(PushEvent.LOSE if self.lost else PushEvent.DRAIN)
        if not self._drained.done():
            self._drained.set_result(None)

    def _fire(self, event: PushEvent) -> None:
        self._machine.fire(event)
        if self.settled:
            self._outbox.settled(self)
            callbacks, self._on_free = self._on_free, []
            for on_free in callbacks:
                on_free()

    def _close(self) -> None:
        """No more writes; the flush behind the last one says when it is over. Any thread, under the lock."""
        if not self._closed:
            self._closed = True
            self._sender.put(Flush(self))

    def _complete(self) -> None:
        """Nothing is missing: once it is there, the receiver is told. Idempotent; nothing once stopped."""
        if self._machine.allows(PushEvent.FINISH):
            self._fire(PushEvent.FINISH)
            self._delivery = self._outbox.spawn(self._deliver())

    async def _deliver(self) -> TransferError | None:
        """Returns what went wrong."""
        try:
            await self._wait_drained()
            if self.error is not None:
                raise self.error
            await self._outbox.deliver(self)
        except TransferError as error:
            self._give_up(error)
            return error
        return None

    def stop(self, error: TransferError) -> None:
        """End without success; idempotent. The receiver is told once the running write has ended."""
        if self.state not in (PushState.OPEN, PushState.DRAINING):
            return
        delivering = self.state is PushState.DRAINING
        self.error = self.error or error
        with self._lock:
            self._close()
        self._fire(PushEvent.STOP)
        if not delivering:  # else that wakes up with the error and concludes
            self._outbox.conclude(self)

    async def finish(self) -> None:
        with self._lock:
            self._close()
        self._complete()
        if self._delivery is None:
            raise self.error or TransferCancelled(f"{self!r} has ended")
        try:
            await asyncio.wait([self._delivery])
        except asyncio.CancelledError:
            self.stop(TransferCancelled("the sender's request was cancelled"))
            raise
        if self._delivery.cancelled():
            raise TransferCancelled("the sender is shutting down")
        if (error := self._delivery.result()) is not None:
            raise error

    def _give_up(self, error: TransferError) -> None:
        self.error = self.error or error
        if self._machine.allows(PushEvent.STOP):
            self._fire(PushEvent.STOP)
        self._outbox.conclude(self)

    async def drained(self) -> None:
        """Until the thread has passed the last write; no deadline of its own."""
        await asyncio.shield(self._drained)

    async def _wait_drained(self) -> None:
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                await self.drained()
        except TimeoutError:
            raise TransferTimeout(f"the push to {self.peer} did not end before its deadline") from None

    async def abort(self, reason: str) -> None:
        self.stop(TransferCancelled(reason))
        try:
            await self._wait_drained()
        except TransferTimeout:
            logger.warning("%r is still writing after its deadline", self)

    def settle(self) -> None:
        """It is proved that no byte of a lost write moves any more."""
        if self._machine.allows(PushEvent.SETTLE):
            self._fire(PushEvent.SETTLE)

    def release(self, on_free: Callable[[], None]) -> None:
        self.stop(TransferCancelled("the sender released the push"))
        if self.settled:
            on_free()
        else:
            self._on_free.append(on_free)
