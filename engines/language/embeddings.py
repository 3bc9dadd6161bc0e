"""Receives what the encoders computed, into blocks of an arena of our own. It encodes nothing.

    room for the request, or for --embedding-default-tokens of it ▸ queued ▸ runs as far as its rows are here
        ▸ fetch ▸ rows arrive ▸ prefilled ▸ their blocks come back ─┐
            ▲ resume: the next rows, while any are left ◀── room ◀──┘

A request for all of whose rows there is room is fetched at once, each embedding by one fetch. Any other comes piece by
piece, in the order of its prompt and a few pieces at a time, and so may be larger than the arena. Blocks go back when
their rows are computed and no transfer can write there any more. Who waits for whom stands in `embedding_pool`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from engines.dtypes import name_of
from engines.errors import BadRequest, Overloaded, SetupError
from engines.language.embedding_handles import Expected, Handle, Stretch, in_order, whole
from engines.language.embedding_pool import Claim, EmbeddingPool, Run, size, split
from engines.language.embedding_rows import Embeddings, Part
from engines.language.failures import lost_embedding
from engines.transfer.base import Arena, LayoutMismatch, Ticket, Transfer, TransferError

WIDEST = 4
"""Bytes of the widest number in an embedding: a block holds its tokens in any dtype, and more in a narrow one."""
PIECES = 4
"""Pieces of one request that are on their way at a time: the next ones come while one is computed."""
SHARES = 8
"""The pool keeps one share of so many for the oldest request that runs. A request that is too large for the pool comes
in such shares, where --embedding-default-tokens does not say otherwise."""


class Fallback(Protocol):
    """Another place where embeddings may be, for those whose encoder is gone."""

    async def get(self, mm_hash: str, dtype: str, target: memoryview) -> bool:
        """Fill `target`, which has the embedding's length in bytes, with its rows of `dtype`. False: it is not there.

        Never raises, and returns within a deadline of its own. What it leaves in `target` is garbage where it is False.
        """


@runtime_checkable
class Loan(Protocol):
    """An embedding that lies in this process already, where an encoder beside this engine wrote it or will: an entry
    of `ec_transfer_params` that no JSON can be. It is read in place."""

    async def rows(self) -> torch.Tensor:
        """[tokens, width], once it is there; good until `release`. Raises EngineError."""

    def release(self) -> None:
        """Idempotent, at any time."""


@dataclass(frozen=True, slots=True)
class Room:
    """How an arena is shared out: the flags --embedding-block-tokens and --embedding-default-tokens."""

    block_tokens: int = 16
    default_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """What one request of `count` items wants: the loans, and the stretches with handles. These come in pieces of at
    most `piece` blocks, of which `at_once` are under way, once there are `first` blocks for them."""

    count: int
    loans: Mapping[Loan, Stretch]
    handles: Mapping[str, Handle]
    stretches: Sequence[Stretch]
    first: int
    piece: int
    at_once: int


class EmbeddingReceiver:
    """All embeddings of one engine. `width` is the model's: columns of an embedding.

    What cannot be fetched from its encoder is asked of `fallback`. Raises SetupError if the arena is too small.
    """

    def __init__(
        self,
        transfer: Transfer,
        arena: Arena,
        width: int,
        timeout: float,
        fallback: Fallback | None = None,
        room: Room | None = None,
    ) -> None:
        room = room or Room()
        self.block_nbytes = room.block_tokens * width * WIDEST
        count = arena.nbytes // self.block_nbytes
        if count < 2:
            raise SetupError(f"--embedding-bytes {arena.nbytes} is less than two blocks of {self.block_nbytes} bytes")
        self.pool = EmbeddingPool(count, max(1, count // SHARES))
        self.timeout = timeout
        self._transfer = transfer
        self._arena = arena
        self._width = width
        self._fallback = fallback
        self._default_tokens = room.default_tokens

    @property
    def capacity(self) -> int:
        """Bytes of all blocks."""
        return self.pool.capacity * self.block_nbytes

    @property
    def free(self) -> int:
        """Bytes of the blocks that are free."""
        return self.pool.free * self.block_nbytes

    async def receive(self, items: Iterable[Expected], entries: Mapping[str, Any]) -> Embeddings:
        """Fetch the embedding of every distinct item, all at the same time, for one who needs all of them at once.

        Raises BadRequest (an entry is wrong, or can never fit), Overloaded (no room within the timeout), and the error
        of `failures.lost_embedding`. Nothing is held after an error.
        """
        order = self._order(tuple(items), entries)
        if order.first > self.pool.capacity:
            raise BadRequest(
                f"the embeddings of this request take {order.first} blocks of {self.block_nbytes} bytes, this engine "
                f"holds {self.pool.capacity} (--embedding-bytes): send fewer or smaller items"
            )
        claim = self.pool.claim()
        self.pool.start(claim)
        with ExitStack() as undo:
            async with self._bringing(order, claim, lambda: None) as held:
                undo.callback(held.release)
            undo.pop_all()
        return held

    @asynccontextmanager
    async def receiving(
        self, items: Iterable[Expected], entries: Mapping[str, Any], arrived: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Embeddings]:
        """Embeddings that come within; `arrived` is called whenever more are here. The end waits for all.

        The caller tells them how much is computed, which makes room for what is still to come, and releases them: after
        that nothing comes any more, and nothing is waited for. Raises as `receive`, but all can fit; an error once the
        block has begun cancels it, and is raised in its place.
        """
        items = tuple(items)
        order = self._order(items, entries)
        if order.stretches and (self._default_tokens or order.first > self.pool.usable):
            order = self._in_pieces(order, items)
        async with self._bringing(order, self.pool.claim(), arrived) as held:
            yield held

    @asynccontextmanager
    async def _bringing(self, order: Order, claim: Claim, arrived: Callable[[], None]) -> AsyncIterator[Embeddings]:
        runs = await self._first(claim, order.first) if order.first else []
        delivery = Delivery(self, order, claim, runs, arrived)
        try:
            async with asyncio.TaskGroup() as group:
                delivery.start(group)
                yield delivery.held
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one lost item is enough to say

    async def _first(self, claim: Claim, count: int) -> list[Run]:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.pool.take(claim, count, count)
        except TimeoutError:
            raise self.full() from None

    def full(self) -> Overloaded:
        message = f"no room for embeddings within {self.timeout:g} s; raise --embedding-bytes, or try again"
        return Overloaded(message, code="embedding_arena_full")

    def _order(self, items: Sequence[Expected], entries: Mapping[str, Any]) -> Order:
        """Everything at once. Raises BadRequest."""
        lent = {name: loan for name, loan in entries.items() if isinstance(loan, Loan)}
        handles = {item.mm_hash: Handle.read(item, entries, self._width) for item in items if item.mm_hash not in lent}
        stretches = whole(items)
        loans = {lent[one.mm_hash]: one for one in stretches if one.mm_hash in lent}
        fetched = [one for one in stretches if one.mm_hash in handles]
        blocks = sum(self.blocks(handles[one.mm_hash], one.end) for one in fetched)
        return Order(len(items), loans, handles, fetched, first=blocks, piece=blocks, at_once=len(fetched))

    def _in_pieces(self, order: Order, items: Sequence[Expected]) -> Order:
        stretches = [one for one in in_order(items) if one.mm_hash in order.handles]
        front, handle = stretches[0], order.handles[stretches[0].mm_hash]
        piece = self.pool.spare
        if self._default_tokens:
            piece = min(self.blocks(handle, self._default_tokens), self.pool.usable)
        first = min(piece, self.blocks(handle, front.end - front.first))
        return replace(order, stretches=stretches, first=first, piece=piece, at_once=PIECES)

    # -- for deliveries

    def rows_per_block(self, handle: Handle) -> int:
        return self.block_nbytes // handle.row_nbytes

    def blocks(self, handle: Handle, rows: int) -> int:
        return -(-rows // self.rows_per_block(handle))

    def reserve(self, runs: Sequence[Run], nbytes: int) -> Ticket:
        """A ticket for the first `nbytes` of these blocks, which go back to the pool when it is free."""
        spans = []
        for first, count in runs:
            spans.append((first * self.block_nbytes, min(count * self.block_nbytes, nbytes)))
            nbytes -= spans[-1][1]
        on_free = partial(self.pool.give_back, runs)
        return self._transfer.reserve(self._arena, spans, timeout=self.timeout, on_free=on_free)

    def parts(self, runs: Sequence[Run], handle: Handle, first: int, end: int) -> list[Part]:
        """Rows `first` to `end - 1` of an embedding, as they lie in these blocks."""
        found: list[Part] = []
        for block, count in runs:
            rows = min(count * self.rows_per_block(handle), end - first)
            at = block * self.block_nbytes
            flat = torch.frombuffer(self._arena.buffer, dtype=handle.dtype, count=rows * self._width, offset=at)
            found.append((first, flat.view(rows, self._width)))
            first += rows
        return found

    async def elsewhere(self, handle: Handle) -> torch.Tensor | None:
        """The embedding from the fallback, in memory of its own: a lost writer may still write into the arena."""
        if self._fallback is None:
            return None
        rows = bytearray(handle.shape[0] * handle.row_nbytes)
        if not await self._fallback.get(handle.mm_hash, name_of(handle.dtype), memoryview(rows)):
            return None
        return torch.frombuffer(rows, dtype=handle.dtype).view(handle.shape)


class Delivery:
    """Brings what one request has ordered, as there is room for it. `runs`: blocks that it has already."""

    def __init__(
        self, receiver: EmbeddingReceiver, order: Order, claim: Claim, runs: list[Run], arrived: Callable[[], None]
    ) -> None:
        self.held = Embeddings(order.count, self._changed)
        self._receiver, self._pool = receiver, receiver.pool
        self._order = order
        self._claim = claim
        self._unused = runs
        self._arrived = arrived
        self._missing: int | None = None  # as it was told
        self._under_way = asyncio.Semaphore(order.at_once)
        self._rescued: dict[str, torch.Tensor] = {}  # what its encoder has lost
        self._rescuing = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None  # with the wait for room
        self._fetching: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        for loan, stretch in self._order.loans.items():
            self.held.keep(loan, stretch)
            group.create_task(self._borrow(loan))
        for stretch in self._order.stretches:
            self.held.expect(stretch, stretch.at)
        self._missing = self.held.missing
        self._fetching = group.create_task(self._fetch_all(group))

    def _changed(self) -> None:
        """The request has computed more, or ended."""
        if not self.held.released:
            self._pool.start(self._claim)
            self._tell()
            return
        if self._fetching is not None:
            self._fetching.cancel()
        self._end()

    def _end(self) -> None:
        """It takes no more blocks. Idempotent."""
        self._pool.close(self._claim)
        runs, self._unused = self._unused, []
        self._pool.give_back(runs)

    def _tell(self) -> None:
        """Something is here, or is not needed any more."""
        self._watch()
        if self.held.missing != self._missing:
            self._missing = self.held.missing
            self._arrived()

    async def _borrow(self, loan: Loan) -> None:
        rows = await loan.rows()
        if self.held.keeps(loan):
            self.held.add(loan, (rows.shape[0], rows.shape[1]), [(0, rows)])
            self._tell()

    async def _fetch_all(self, group: asyncio.TaskGroup) -> None:
        """Stretch by stretch, as far as its rows are still needed when it is their turn."""
        for stretch in self._order.stretches:
            handle, first = self._order.handles[stretch.mm_hash], stretch.first
            while (first := stretch.next(first, self.held.computed)) < stretch.end:
                self.held.expect(stretch, stretch.cut(first, stretch.end).at)
                await self._under_way.acquire()
                wanted = min(self._order.piece, self._receiver.blocks(handle, stretch.end - first))
                self._unused = self._unused or await self._resume(wanted)
                if (first := stretch.next(first, self.held.computed)) == stretch.end:
                    self._under_way.release()
                    break  # computed while it waited, since another request had computed the same
                runs, self._unused = split(self._unused, wanted)
                end = min(first + size(runs) * self._receiver.rows_per_block(handle), stretch.end)
                ticket = self._receiver.reserve(runs, (end - first) * handle.row_nbytes)
                self.held.keep(ticket, stretch.cut(first, end))
                group.create_task(self._fetch(ticket, stretch.cut(first, end), runs))
                first = end
            self.held.expect(stretch, None)
        self._end()

    async def _resume(self, most: int) -> list[Run]:
        """More blocks, one at least. While the request has rows to compute, it waits for them without end."""
        try:
            async with asyncio.timeout(None) as self._patience:
                self._watch()
                return await self._pool.take(self._claim, 1, most)
        except TimeoutError:
            raise self._receiver.full() from None
        finally:
            self._patience = None

    def _watch(self) -> None:
        """The wait for room has a deadline from when there is nothing else to compute."""
        if self._patience is None or self._patience.expired():
            return
        missing = self.held.missing
        if self._claim.started is None or missing is None or self.held.computed < missing:
            self._patience.reschedule(None)
        elif self._patience.when() is None:
            self._patience.reschedule(asyncio.get_running_loop().time() + self._receiver.timeout)

    async def _fetch(self, ticket: Ticket, piece: Stretch, runs: Sequence[Run]) -> None:
        handle = self._order.handles[piece.mm_hash]
        parts = self._receiver.parts(runs, handle, piece.first, piece.end)
        try:
            if handle.mm_hash not in self._rescued:
                await self._ask(ticket, piece, handle)
        except TransferError as error:
            await self._rescue(ticket, handle, error)
        finally:
            self._under_way.release()
        if not self.held.keeps(ticket):
            return  # computed meanwhile, or released
        if (rows := self._rescued.get(handle.mm_hash)) is not None:
            parts = [(piece.first, rows[piece.first : piece.end])]
            ticket.release()
        self.held.add(ticket, handle.shape, parts)
        self._tell()

    async def _rescue(self, ticket: Ticket, handle: Handle, error: TransferError) -> None:
        """Have the embedding from elsewhere, once for all its pieces, unless nobody needs this one any more."""
        async with self._rescuing:
            if handle.mm_hash in self._rescued or not self.held.keeps(ticket):
                return
            rows = await self._receiver.elsewhere(handle)
            if rows is not None:
                self._rescued[handle.mm_hash] = rows
            elif self.held.keeps(ticket):
                raise lost_embedding(error, handle.mm_hash) from error

    @staticmethod
    async def _ask(ticket: Ticket, piece: Stretch, handle: Handle) -> None:
        left = await ticket.fetch(handle.where, start=piece.first * handle.row_nbytes, more=piece.more)
        if left != (handle.shape[0] - piece.end) * handle.row_nbytes:
            raise LayoutMismatch(f"{left} bytes are left behind row {piece.end} of {handle.shape[0]}")
