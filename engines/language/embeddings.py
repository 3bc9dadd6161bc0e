"""Receives what the encoders computed: one fetch per distinct item, into an arena of our own. It encodes nothing.

An `Embeddings` is held from before the fetch until the prompt is prefilled; then its bytes go back to the arena, each
range when no transfer can write there any more. Requests wait for room in the arena in the order of arrival.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from engines.errors import BadRequest, Overloaded
from engines.language.failures import lost_embedding
from engines.ranges import Ranges
from engines.transfer.base import Arena, Ticket, Transfer, TransferError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Expected(Protocol):
    """An item of a prompt, as far as its embedding goes."""

    @property
    def mm_hash(self) -> str: ...
    @property
    def num_rows(self) -> int: ...


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
class Handle:
    """What an encoder told of one item, checked against what this model needs."""

    mm_hash: str
    dtype: torch.dtype
    shape: tuple[int, int]
    where: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def read(cls, item: Expected, entries: Mapping[str, Any], width: int) -> Handle:
        """Raises BadRequest when the entry is missing, misshapen or of another model."""
        param = f"ec_transfer_params.{item.mm_hash}"
        entry = entries.get(item.mm_hash)
        if not isinstance(entry, Mapping):
            raise BadRequest(
                f"there is no embedding of item {item.mm_hash}: this engine has no encoder", param=param, stage="encode"
            )
        shape, where = entry.get("shape"), entry.get("where")
        if shape != [item.num_rows, width]:
            message = f"the embedding of {item.mm_hash} has shape {shape}, this model needs {[item.num_rows, width]}"
            raise BadRequest(message, param=f"{param}.shape", stage="encode", code="embedding_mismatch")
        dtype = DTYPES.get(str(entry.get("dtype")))
        if dtype is None or not isinstance(where, Mapping):
            raise BadRequest(f"dtype must be one of {', '.join(DTYPES)} and where an object", param=param)
        return cls(item.mm_hash, dtype, (item.num_rows, width), where)


class Embeddings:
    """The tensors of one request's items, by mm_hash, on the arena. `release` is idempotent and ends their life."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.released = False
        self._tickets: list[Ticket | Loan] = []

    def hold(self, ticket: Ticket | Loan) -> None:
        self._tickets.append(ticket)

    def of(self, items: Iterable[Expected]) -> list[torch.Tensor | None]:
        return [self.tensors.get(item.mm_hash) for item in items]

    def release(self) -> None:
        self.tensors, self.released = {}, True
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.release()


class EmbeddingReceiver:
    """All embeddings of one engine. `width` is the model's: columns of an embedding.

    What cannot be fetched from its encoder is asked of `fallback`.
    """

    def __init__(
        self, transfer: Transfer, arena: Arena, width: int, timeout: float, fallback: Fallback | None = None
    ) -> None:
        self.ranges = Ranges(arena.nbytes)
        self._transfer = transfer
        self._arena = arena
        self._width = width
        self._timeout = timeout
        self._fallback = fallback
        self._turn = asyncio.Lock()  # first come, first served: only its holder waits for room
        self._freed = asyncio.Event()

    async def receive(self, items: Iterable[Expected], entries: Mapping[str, Any]) -> Embeddings:
        """Fetch the embedding of every distinct item, all at the same time.

        Raises BadRequest (an entry is wrong, or can never fit), Overloaded (no room within the timeout), and the error
        of `failures.lost_embedding`. Nothing is held after an error.
        """
        with ExitStack() as undo:
            async with self.receiving(items, entries) as held:
                undo.callback(held.release)
            undo.pop_all()
        return held

    @asynccontextmanager
    async def receiving(
        self, items: Iterable[Expected], entries: Mapping[str, Any], arrived: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Embeddings]:
        """As `receive`, but the embeddings come within, and `arrived` is called as each does; the end waits for all.

        An embedding that is lost cancels the block, and is raised in its place. The caller releases what it is given:
        after that nothing comes any more, and nothing is waited for.
        """
        distinct = {item.mm_hash: item for item in items}
        loans = {name: loan for name in distinct if isinstance(loan := entries.get(name), Loan)}
        handles = [Handle.read(item, entries, self._width) for name, item in distinct.items() if name not in loans]
        held = Embeddings()
        offsets = await self._room([handle.nbytes for handle in handles]) if handles else []
        tickets = [self._reserve(held, handle, at) for handle, at in zip(handles, offsets, strict=True)]
        try:
            async with asyncio.TaskGroup() as group:
                for handle, at, ticket in zip(handles, offsets, tickets, strict=True):
                    group.create_task(self._bring(held, handle, at, ticket, arrived))
                for mm_hash, loan in loans.items():
                    held.hold(loan)
                    group.create_task(self._borrow(held, mm_hash, loan, arrived))
                yield held
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one lost item is enough to say

    async def _bring(
        self, held: Embeddings, handle: Handle, offset: int, ticket: Ticket, arrived: Callable[[], None]
    ) -> None:
        tensor = None
        try:
            await ticket.fetch(handle.where)
        except TransferError as error:
            tensor = None if held.released else await self._elsewhere(handle)
            if tensor is None and not held.released:
                raise lost_embedding(error, handle.mm_hash) from error
        if not held.released:
            held.tensors[handle.mm_hash] = self._tensor(handle, offset) if tensor is None else tensor
            arrived()

    async def _borrow(self, held: Embeddings, mm_hash: str, loan: Loan, arrived: Callable[[], None]) -> None:
        rows = await loan.rows()
        if not held.released:
            held.tensors[mm_hash] = rows
            arrived()

    async def _elsewhere(self, handle: Handle) -> torch.Tensor | None:
        """The embedding from the fallback, in memory of its own: a lost writer may still write into the arena."""
        if self._fallback is None:
            return None
        rows, dtype = bytearray(handle.nbytes), str(handle.dtype).removeprefix("torch.")
        if not await self._fallback.get(handle.mm_hash, dtype, memoryview(rows)):
            return None
        return torch.frombuffer(rows, dtype=handle.dtype).view(handle.shape)

    def _reserve(self, held: Embeddings, handle: Handle, offset: int) -> Ticket:
        on_free = partial(self._give_back, offset)
        spans = [(offset, handle.nbytes)]
        ticket = self._transfer.reserve(self._arena, spans, timeout=self._timeout, on_free=on_free)
        held.hold(ticket)
        return ticket

    async def _room(self, sizes: list[int]) -> list[int]:
        if Ranges(self.ranges.capacity).take_all(sizes) is None:
            raise BadRequest(
                f"the embeddings of this request take {sum(sizes)} bytes, this engine holds {self.ranges.capacity} "
                "(--embedding-bytes): send fewer or smaller items"
            )
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                while (offsets := self.ranges.take_all(sizes)) is None:
                    self._freed.clear()
                    await self._freed.wait()
                return offsets
        except TimeoutError:
            message = f"no room for embeddings within {self._timeout:g} s; raise --embedding-bytes, or try again"
            raise Overloaded(message, code="embedding_arena_full") from None

    def _give_back(self, offset: int) -> None:
        self.ranges.give_back(offset)
        self._freed.set()

    def _tensor(self, handle: Handle, offset: int) -> torch.Tensor:
        flat = torch.frombuffer(self._arena.buffer, dtype=handle.dtype, count=math.prod(handle.shape), offset=offset)
        return flat.view(handle.shape)
