"""A request's KV between two engines: five ways to run a leg, each an async context that undoes all it did.

Whatever ends a leg (an answer, an error, the client's going away), the stream is closed, tickets, pushes and
publications are released, and the blocks are unpinned by whoever can tell that no transfer touches them any more.
Commands to the model thread keep their order, so an unpin never overtakes the abort before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Listing
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from engines.errors import BadRequest
from engines.language import descriptors
from engines.language.descriptors import Ask, Fetch, Keep, Plan, Publish, Push, Self
from engines.language.engine import LanguageEngine, Sink
from engines.language.failures import lost_kv
from engines.language.kv import KVLayout
from engines.language.metaserver import Metaserver
from engines.language.metrics import Metrics
from engines.language.mirror import Ready
from engines.language.parallel.carrier import Carrier, ParallelTicket, parts_of
from engines.language.sequence import Handoff, Scheduled, Sequence
from engines.language.stream import Stream
from engines.transfer.base import Arena, LayoutMismatch, TransferError
from engines.transfer.base import PeerFailed as TransferFailed
from engines.transfer.base import Push as Sender

log = logging.getLogger(__name__)

LAST_WORDS = 1.0  # seconds


class Cache(Protocol):
    """The KV cache as transfers see it: see `KVCache`."""

    @property
    def layout(self) -> KVLayout: ...
    def stage(self, layers: range, blocks: Listing[int]) -> Ready | None: ...


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds, each a flag of the same name."""

    handoff_timeout: float
    kv_lease: float


@dataclass(slots=True)
class Job:
    """A sequence to run. `on_prefilled` is called once, on the loop, when its embeddings are not needed any more."""

    seq: Sequence
    request_id: str  # with its prefix, as on the wire
    on_prefilled: Callable[[], None]
    submitted: bool = False


async def _nothing() -> dict[str, Any] | None:
    return None


@dataclass(frozen=True, slots=True)
class Leg:
    """A running request. After its last token, `finish` completes the handoff; its result is for the next engine."""

    stream: Stream
    finish: Callable[[], Awaitable[dict[str, Any] | None]] = _nothing


class Handoffs:
    """All legs of one engine. Loop only; `close` when no leg is left."""

    def __init__(
        self,
        engine: LanguageEngine,
        carrier: Carrier,
        kv: tuple[Arena, Cache],
        waits: Waits,
        metrics: Metrics,
        metaserver: Metaserver,
    ) -> None:
        self._engine = engine
        self._carrier = carrier
        self._arena, self._cache = kv
        self._layout = self._cache.layout
        self._waits = waits
        self._metrics = metrics
        self._metaserver = metaserver
        self._calls: set[asyncio.Task[None]] = set()  # to metaservers, for KV that is here already

    @asynccontextmanager
    async def leg(self, plan: Plan, job: Job) -> AsyncIterator[Leg]:
        """Run the job as planned. Raises EngineError with the stage that is to blame."""
        try:
            async with self._open(plan, job) as leg:
                yield leg
        except TransferError as error:
            raise lost_kv(error, "decode" if isinstance(plan, Push | Publish) else "prefill") from error
        finally:
            if not job.submitted:
                job.on_prefilled()

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _open(self, plan: Plan, job: Job) -> AbstractAsyncContextManager[Leg]:
        match plan:
            case Keep():
                return self._keep(job)
            case Push():
                return self._push(plan, job)
            case Publish():
                return self._publish(job)
            case Ask():
                return self._receive(job, partial(self._ask, plan, job))
            case Fetch():
                self._check_fetch(plan, job.seq)
                return self._receive(job, lambda ticket, _blocks: ticket.fetch(plan.where))

    def _submit(self, job: Job, handoff: Handoff = Handoff.NONE, sink: Sink | None = None) -> Stream:
        job.seq.handoff = handoff
        stream = self._engine.submit(job.seq, sink=sink, on_prefilled=job.on_prefilled)
        job.submitted = True
        return stream

    @asynccontextmanager
    async def _keep(self, job: Job) -> AsyncIterator[Leg]:
        stream = self._submit(job)
        try:
            yield Leg(stream)
        finally:
            stream.close()

    # -- our prefill --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _push(self, plan: Push, job: Job) -> AsyncIterator[Leg]:
        """Write each group of layers into the decode engine's blocks while the next is computed. It is told that all is
        there as soon as that is so: our own first token is not waited for."""
        sender = await self._carrier.open(plan.offer, timeout=self._waits.handoff_timeout)
        copies: list[Ready] = []
        try:
            sink = self._sink(sender, plan.blocks, job.seq, copies)
            stream = self._submit(job, Handoff.SEND, sink)
            try:
                yield Leg(stream, partial(self._finish_push, sender))
            finally:
                stream.close()
        except asyncio.CancelledError:
            await sender.abort("the request was cancelled at prefill")
            raise
        except Exception as error:
            await sender.abort(f"prefill failed: {error}")
            raise
        finally:
            sender.release(partial(self._engine.unpin, job.seq, copies))

    async def _finish_push(self, sender: Sender) -> None:
        began = time.monotonic()
        await sender.finish()
        self._metrics.kv_transfer.labels("sent").observe(time.monotonic() - began)

    def _sink(self, sender: Sender, blocks: tuple[int, ...], seq: Sequence, copies: list[Ready]) -> Sink:
        """Sends what each chunk completes; a step that is run again after the last of it sends nothing more."""
        self._layout.check(sender.facts)
        remote = replace(self._layout, num_blocks=int(sender.facts["num_blocks"]))
        size = self._layout.block_size
        if len(blocks) != -(-seq.num_prompt_tokens // size):
            raise BadRequest(
                f"{len(blocks)} remote blocks of {size} tokens are not what {seq.num_prompt_tokens} prompt tokens take",
                param=f"{descriptors.FIELD}.remote_block_ids",
            )

        whole = False

        def sink(entry: Scheduled, first: int, last: int) -> None:
            nonlocal whole
            done, layers = self._completed(entry), range(first, last)
            ours, theirs = seq.block_table[done], blocks[done]
            if ours and not whole:
                ready = self._stage(layers, ours, copies)
                whole = last == self._layout.num_layers and done.stop == len(blocks)
                spans = self._layout.spans(layers, ours), remote.spans(layers, theirs)
                sender.write(self._arena, *spans, ready, last=whole)

        return sink

    def _completed(self, entry: Scheduled) -> slice:
        """The blocks that a chunk completes, with the first chunk those that were here before it, and with the
        prompt's last chunk the one it leaves unfinished."""
        seq, size = entry.seq, self._layout.block_size
        start = 0 if entry.start == seq.num_cached else entry.start
        end = entry.start + entry.count
        return slice(start // size, end // size if end < seq.num_prompt_tokens else -(-seq.num_prompt_tokens // size))

    def _stage(self, layers: range, blocks: Listing[int], copies: list[Ready]) -> Ready | None:
        ready = self._cache.stage(layers, blocks)
        if ready is not None:
            copies.append(ready)
        return ready

    @asynccontextmanager
    async def _publish(self, job: Job) -> AsyncIterator[Leg]:
        """Keep the prompt's blocks readable until the decode engine has read them, or the lease ends."""
        copies: list[Ready] = []

        def sink(entry: Scheduled, first: int, last: int) -> None:
            self._stage(range(first, last), job.seq.block_table[self._completed(entry)], copies)

        stream = self._submit(job, Handoff.SEND, sink)
        unpin = partial(self._engine.unpin, job.seq, copies)
        is_published = False

        async def finish() -> dict[str, Any]:
            nonlocal is_published
            blocks = await stream.admitted()
            for ready in copies:
                await asyncio.to_thread(ready)
            where = await self._carrier.publish(
                job.seq.id, self._arena, self._spans(blocks), ttl=self._waits.kv_lease, on_free=unpin
            )
            is_published = True
            count, facts = job.seq.num_prompt_tokens, self._layout.facts()
            return descriptors.published(self._me(), job.request_id, blocks, count, where, facts)

        try:
            yield Leg(stream, finish)
        except BaseException:
            self._carrier.withdraw(job.seq.id)
            raise
        finally:
            stream.close()
            if not is_published:
                unpin()

    # -- our decode ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _receive(
        self, job: Job, bring: Callable[[ParallelTicket, tuple[int, ...]], Awaitable[None]]
    ) -> AsyncIterator[Leg]:
        """Reserve blocks, have the prompt's KV brought into them, decode."""
        stream = self._submit(job, Handoff.RECEIVE)
        unpin = partial(self._engine.unpin, job.seq)
        ticket: ParallelTicket | None = None
        try:
            blocks = await stream.admitted()
            began = time.monotonic()
            ticket = await self._carrier.reserve(
                self._arena, self._spans(blocks), timeout=self._waits.handoff_timeout, on_free=unpin
            )
            await bring(ticket, blocks)
            self._metrics.kv_transfer.labels("received").observe(time.monotonic() - began)
            ticket.release()
            self._engine.arrived(job.seq)
            yield Leg(stream)
        finally:
            stream.close()
            if ticket is None:
                unpin()
            else:
                ticket.release()

    def _check_fetch(self, plan: Fetch, seq: Sequence) -> None:
        try:
            parts_of(plan.where, self._carrier.size)
            self._layout.check(plan.layout)
        except LayoutMismatch as error:
            raise lost_kv(error) from error
        if plan.num_tokens != seq.num_prompt_tokens:
            raise BadRequest(
                f"prefill saw a prompt of {plan.num_tokens} tokens, decode has {seq.num_prompt_tokens}: "
                "send both the same messages",
                param=f"{descriptors.FIELD}.remote_num_tokens",
            )

    async def _ask(self, plan: Ask, job: Job, ticket: ParallelTicket, blocks: tuple[int, ...]) -> None:
        """Call the metaserver and wait for the KV. It is here when the sender says so; the call may return later."""
        body = descriptors.asking(self._me(), job.request_id, blocks, self._layout.block_size, ticket.offer())
        call = asyncio.create_task(self._metaserver.call(plan.metaserver, body))  # noqa: TID251 - ends below, or is kept
        arrival = asyncio.create_task(ticket.wait())  # noqa: TID251 - ends below
        try:
            await asyncio.wait({call, arrival}, return_when=asyncio.FIRST_COMPLETED)
            if not arrival.done():
                call.result()
            await self._arrived(arrival, call)
            self._keep_call(call)
        except BaseException:
            call.cancel()
            arrival.cancel()
            await asyncio.gather(call, arrival, return_exceptions=True)
            raise

    async def _arrived(self, arrival: asyncio.Task[None], call: asyncio.Task[None]) -> None:
        """Wait for the KV. A prefill that gave up tells the metaserver too, whose answer says more of it."""
        try:
            await arrival
        except TransferFailed:
            with suppress(TimeoutError):
                await asyncio.wait_for(call, LAST_WORDS)
            raise

    def _keep_call(self, call: asyncio.Task[None]) -> None:
        """Hanging up before the metaserver answers would make it cancel the prefill that has just served us."""

        def ended(call: asyncio.Task[None]) -> None:
            self._calls.discard(call)
            if not call.cancelled() and (error := call.exception()) is not None:
                log.warning("the metaserver failed after the KV had come: %r", error)

        self._calls.add(call)
        call.add_done_callback(ended)

    def _spans(self, blocks: tuple[int, ...]) -> list[tuple[int, int]]:
        return self._layout.spans(range(self._layout.num_layers), blocks)

    def _me(self) -> Self:
        address = self._carrier.address
        return Self(address.nonce, address.host, address.port, self._carrier.size)
