"""The nouns of the transfer layer: spans, arenas, tickets, pushes, and the errors all of them raise.

It moves nothing and opens nothing: implementations live beside it and are made by `engines.transfer.create`.
The receiver owns the memory: it reserves spans of one of its arenas, a sender writes into them, and the word "done"
travels over our own control channel, never inside the data.

    receiver                                   sender
    reserve(arena, spans) -> Ticket            publish(key, arena, spans) -> where
      ticket.fetch(where)  ── asks ──────────▶   writes the published bytes, says done
      ticket.offer()       ── by any route ──▶ open(offer) -> Push;  write … write, finish
      ticket.wait()        ◀───── done ─────

Errors, all `TransferError` (`retryable`: another attempt, perhaps elsewhere, can succeed):

    PeerUnreachable       the peer could not be contacted, nothing was written          retryable
    PeerFailed            the peer died, gave up, or said that it failed                retryable
    TransferTimeout       the deadline passed; says nothing about who still writes      retryable
    TransferCancelled     this side released the ticket or the push                     not
    GoneError             the key is not published any more                             retryable
    LayoutMismatch        the two sides disagree about sizes, shapes or facts           not
    TransportUnavailable  a library or device this transport needs is missing           not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

if TYPE_CHECKING:
    from engines.transfer.lifecycle import TicketState

Spans = Sequence[tuple[int, int]]
"""(offset, length) in bytes within one arena, in logical order: the first byte of the first span is byte 0."""


class TransferError(Exception):
    """A transfer did not happen. `str(error)` says what failed and what to do."""

    retryable: ClassVar[bool] = False


class PeerUnreachable(TransferError):
    retryable = True


class PeerFailed(TransferError):
    retryable = True


class TransferTimeout(TransferError):
    retryable = True


class TransferCancelled(TransferError):
    pass


class GoneError(TransferError):
    retryable = True


class LayoutMismatch(TransferError):
    pass


class TransportUnavailable(TransferError):
    pass


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process life: where its control channel listens, and how to prove that it is over.

    A restarted process has another nonce even on the same port. `machine` is equal only for processes that see each
    other's pids (same boot, same pid namespace); there `pid` and `started` (clock ticks since boot) name the process.
    """

    host: str
    port: int
    nonce: str
    machine: str = ""
    pid: int = 0
    started: int = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.nonce[:8]}"


class Arena(Protocol):
    """One big region that is registered once and lives as long as its transfer."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def buffer(self) -> memoryview:
        """Writable, one dimension, format "B". `torch.frombuffer(arena.buffer, dtype=…)` is a tensor on the arena."""


class Ticket(Protocol):
    """The promise that bytes will come into reserved spans. Made by `Transfer.reserve`; always ends in `release`."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> TicketState: ...

    async def fetch(self, where: Mapping[str, Any], *, start: int | None = None, more: bool = False) -> int:
        """Ask the owner of `where` to write the published bytes into our spans; return when all are there.

        With `start`, those from that byte on, as many as the spans hold; the answer is how many are left behind them,
        which another ticket may fetch. `more` tells the owner that we come back: a read as `once` and `on_read` mean
        it is our last. Raises GoneError, LayoutMismatch (total lengths differ; with `start`: the spans hold more than
        there is), PeerUnreachable, PeerFailed, TransferTimeout, and TransferCancelled if the ticket is released
        meanwhile. A ticket fetches once.
        """

    def offer(self) -> dict[str, Any]:
        """JSON-able; whoever holds it may write into the spans, once, until the ticket ends. For `Transfer.open`."""

    async def wait(self) -> None:
        """Until the sender said done. Raises PeerFailed, TransferTimeout or TransferCancelled."""

    def release(self) -> None:
        """Idempotent, in any state. The caller must not read the spans afterwards.

        `on_free()` fires exactly once, on the loop: at once if nobody can still write, else (quarantine) when the
        writer said that it stopped, or its process life is proved over. A timeout proves nothing.
        """


class Push(Protocol):
    """A sender's hold on one ticket. Made by `Transfer.open`; always ends in `release`."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The receiver's `Transfer.facts`."""

    def write(
        self, arena: Arena, source: Spans, target: Spans, ready: Callable[[], None] | None = None, last: bool = False
    ) -> None:
        """Queue a copy of `source` (ours) to `target` (the receiver's); returns at once, from any thread.

        Writes of one push are done in order, by one thread per peer, which calls `ready` first: it returns once the
        source bytes are there. They must stay unchanged until `finish` returns. Raises LayoutMismatch if the total
        lengths differ or a span lies outside the arena or the offer, TransferCancelled once the push has ended. A write
        that fails later makes `finish` raise. After the `last` one the receiver is told as soon as all is there, and
        `finish` only waits for that.
        """

    async def finish(self) -> None:
        """Until every write is applied and the receiver knows. Raises what went wrong: PeerFailed, TransferTimeout…"""

    async def abort(self, reason: str) -> None:
        """Stop queued writes, let the running one end, tell the receiver `reason`. Never raises TransferError."""

    def release(self, on_free: Callable[[], None]) -> None:
        """`on_free()` fires exactly once, on the loop, when no transfer can read our source memory any more."""


class Transfer(Protocol):
    """All of one engine's transfers. Methods are called on the running loop unless they say otherwise."""

    @property
    def name(self) -> str: ...
    @property
    def carries_kv(self) -> bool:
        """False: published embeddings only; `offer`, `open` raise TransferError."""

    @property
    def durable(self) -> bool:
        """True: what was published stays readable after `withdraw`, so nobody needs our memory for it."""

    facts: dict[str, Any]
    """Set before `start`, JSON-able; every sender that opens one of our tickets reads it (KV layout fingerprint …)."""

    def allocate(self, name: str, nbytes: int) -> Arena:
        """Before `start`. The memory is zeroed and page-aligned. Raises TransferError when it cannot be had."""

    async def start(self) -> None:
        """Open the control channel. Raises TransportUnavailable."""

    async def close(self) -> None:
        """Fail what is open, tell peers where that is quick, remove what we made on the system. Bounded, idempotent."""

    @property
    def address(self) -> Address:
        """After `start`."""

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
        """Let holders of the (JSON-able) answer fetch these bytes, any number of times, until `withdraw` or `ttl` s.

        `once`: withdrawn by the first fetch that succeeded. `on_read()` fires on the loop after each fetch that did;
        never where `durable`. `dtype` and `shape` are what a storage file records. `promised`: the bytes are there once
        `fulfil` is called; fetches wait for that, and fail if it is withdrawn first. Nothing can be where `durable`.
        Raises ValueError if `key` is published already.
        """

    def fulfil(self, key: str) -> None:
        """The bytes that were promised under `key` are there. Raises LookupError if it is not published."""

    async def restore(self, key: str) -> None:
        """Write again what was published under `key` if somebody else removed it, which only a shared folder allows.

        Unknown keys are ignored. Raises TransferError when it cannot be written.
        """

    def withdraw(self, key: str) -> None:
        """No new fetches; unknown keys are ignored. `on_free()` fires once, when no transfer can read the spans."""

    def reserve(self, arena: Arena, spans: Spans, *, timeout: float, on_free: Callable[[], None]) -> Ticket:
        """Promise these spans to one writer for `timeout` seconds from now."""

    async def open(self, offer: Mapping[str, Any], *, timeout: float) -> Push:
        """Claim the offered ticket at its receiver; `timeout` bounds the push from here to the end of `finish`."""

    def audit(self) -> dict[str, int]:
        """`tickets`, `publications`, `pushes`, `quarantined_bytes`: all 0 when nothing is held."""
