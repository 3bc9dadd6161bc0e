"""Embeddings as safetensors files in a shared folder, in the layout that vLLM's example connector reads. Carries no KV.

    <path>/<mm_hash>/encoder_cache.safetensors      one tensor, `ec_cache`

No control channel and no peers: publishing writes the file, fetching reads it. Files are named by content and stay
after `withdraw`, for other engines and later lives; cleaning the folder up is its owner's business.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from engines.transfer.base import (
    Address,
    Arena,
    GoneError,
    LayoutMismatch,
    Spans,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    TransportUnavailable,
)
from engines.transfer.lifecycle import TicketEvent, TicketState, ticket_machine
from engines.transfer.liveness import here
from engines.transfer.outbox import Publication
from engines.transfer.receiving import left_behind
from engines.transfer.spans import Table, table, total
from engines.transfer.tasks import Tasks

logger = logging.getLogger(__name__)

FILE = "encoder_cache.safetensors"
TENSOR = "ec_cache"
KEY = re.compile(r"[0-9a-f]{64}")
MAX_HEADER = 1 << 20
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


class Where(msgspec.Struct, frozen=True):
    transport: str
    key: str
    nbytes: Annotated[int, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True):
    """One tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A publication and what its file says."""

    publication: Publication
    path: Path
    dtype: str
    shape: tuple[int, ...]


class HeapArena(msgspec.Struct, frozen=True, eq=False):
    name: str
    nbytes: int
    buffer: memoryview


def save(path: Path, buffer: memoryview, spans: Table, dtype: str, shape: Sequence[int]) -> None:
    """Write the file whole or not at all: a reader never sees a part."""
    entry = Entry(DTYPES[dtype], list(shape), (0, total(spans)))
    header = msgspec.json.encode({TENSOR: entry})
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with partial_path.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for offset, length in spans.tolist():
                file.write(buffer[offset : offset + length])
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a fetch reads: a file whose tensor must have `nbytes`, from its byte `start` on."""

    path: Path
    nbytes: int
    start: int = 0


def load(source: Source, buffer: memoryview, spans: Table, stopped: Callable[[], bool]) -> None:
    """Read the tensor's bytes into the spans. Raises GoneError, LayoutMismatch, TransferCancelled."""
    path = source.path
    try:
        with path.open("rb") as file:
            _seek_tensor(file, source.nbytes, path)
            file.seek(source.start, os.SEEK_CUR)
            for offset, length in spans.tolist():
                if stopped():
                    raise TransferCancelled("the receiver released the ticket")
                if file.readinto(buffer[offset : offset + length]) != length:
                    raise LayoutMismatch(f"{path} is shorter than its header says")
    except FileNotFoundError:
        raise GoneError(f"{path} does not exist (any more)") from None
    except OSError as error:
        raise TransferError(f"cannot read {path}: {error}") from None


def describe(path: Path) -> tuple[str, tuple[int, ...]]:
    """The tensor's dtype, as torch calls it, and shape. Raises GoneError, LayoutMismatch, TransferError."""
    try:
        with path.open("rb") as file:
            entry = _entry(file, path)
    except FileNotFoundError:
        raise GoneError(f"{path} does not exist (any more)") from None
    except OSError as error:
        raise TransferError(f"cannot read {path}: {error}") from None
    name = next((name for name, code in DTYPES.items() if code == entry.dtype), None)
    if name is None:
        raise LayoutMismatch(f"{path} holds {entry.dtype}, which is no embedding's dtype")
    return name, tuple(entry.shape)


def _entry(file: BinaryIO, path: Path) -> Entry:
    """What the header says of the tensor; leaves `file` at the first byte after it."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > MAX_HEADER:
            raise LayoutMismatch(f"{path} is no embedding: its header has {length} bytes")
        return msgspec.convert(msgspec.json.decode(file.read(length))[TENSOR], Entry)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise LayoutMismatch(f"{path} has no tensor {TENSOR!r}: {error}") from None


def _seek_tensor(file: BinaryIO, nbytes: int, path: Path) -> None:
    """Leave `file` at the first byte of the tensor."""
    entry = _entry(file, path)
    begin, end = entry.data_offsets
    if begin < 0 or end - begin != nbytes or math.prod(entry.shape) * WIDTHS.get(entry.dtype, 0) != nbytes:
        raise LayoutMismatch(f"{path} holds {entry.dtype}{entry.shape}, not {nbytes} bytes")
    file.seek(begin, os.SEEK_CUR)


class StorageTicket:
    """`Ticket` whose only writer is our own reading thread."""

    def __init__(self, owner: Storage, arena: Arena, spans: Spans, timeout: float, on_free: Callable[[], None]) -> None:
        self.id = secrets.token_hex(16)
        self.spans = table(spans, arena.nbytes)
        self.nbytes = total(self.spans)
        self.error: TransferError | None = None
        self._owner, self._arena, self._on_free = owner, arena, on_free
        self._machine = ticket_machine()
        self._ended = asyncio.Event()
        self._expiry = asyncio.get_running_loop().call_later(timeout, self._expire)

    @property
    def state(self) -> TicketState:
        return self._machine.state

    def _fire(self, event: TicketEvent, error: TransferError | None = None) -> bool:
        if not self._machine.allows(event):
            return False
        after = self._machine.fire(event)
        self.error = self.error or error
        if after not in (TicketState.RESERVED, TicketState.WRITING):
            self._expiry.cancel()
            self._ended.set()
        if after is TicketState.FREE:
            self._owner.forget(self)
            self._on_free()
        return True

    def _expire(self) -> None:
        self._fire(TicketEvent.EXPIRE, TransferTimeout("reading the embedding took too long"))

    async def fetch(self, where: Mapping[str, Any], *, start: int | None = None, more: bool = False) -> int:
        handle = self._owner.read(where)
        left = left_behind(handle.nbytes, start, self.nbytes)
        source = Source(self._owner.file(handle.key), handle.nbytes, start or 0)
        if not self._fire(TicketEvent.CLAIM):
            raise self.error or TransferCancelled("a ticket is used once")
        self._owner.tasks.spawn(self._read(source))
        await self.wait()
        return left

    async def _read(self, source: Source) -> None:
        try:
            # the thread outlives a cancelled fetch; the ticket stays in quarantine until it has ended
            await asyncio.to_thread(load, source, self._arena.buffer, self.spans, self._ended.is_set)
        except TransferError as error:
            _ = self._fire(TicketEvent.FAIL, error) or self._fire(TicketEvent.SETTLE)
        else:
            _ = self._fire(TicketEvent.DONE) or self._fire(TicketEvent.SETTLE)

    def offer(self) -> dict[str, Any]:
        raise TransferError("the storage transport carries no KV: choose shm, mooncake or zmq")

    async def wait(self) -> None:
        await self._ended.wait()
        if self.state is not TicketState.COMPLETE:
            raise self.error or TransferCancelled("the receiver released the ticket")

    def release(self) -> None:
        self._fire(TicketEvent.RELEASE, TransferCancelled("the receiver released the ticket"))


class Storage:
    name = "storage"
    carries_kv = False
    durable = True

    def __init__(self, path: Path, host: str) -> None:
        self.facts: dict[str, Any] = {}
        self.tasks = Tasks()
        self.address: Address = here(host, 0)
        self._path = path
        self._tickets: dict[str, StorageTicket] = {}
        self._published: dict[str, Stored] = {}

    def allocate(self, name: str, nbytes: int) -> Arena:
        return HeapArena(name, nbytes, np.zeros(nbytes, dtype=np.uint8).data)

    async def start(self) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            usable = os.access(self._path, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise TransportUnavailable(f"cannot use the storage folder {self._path}: {error}") from None
        if not usable:
            raise TransportUnavailable(f"cannot read and write in the storage folder {self._path}")

    async def close(self) -> None:
        for key in list(self._published):
            self.withdraw(key)
        for ticket in list(self._tickets.values()):
            ticket.release()
        await self.tasks.close()

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
        if promised:
            raise TransferError("a file is published once its bytes are there")
        checked = table(spans, arena.nbytes)
        if dtype not in DTYPES or math.prod(shape) * WIDTHS[DTYPES[dtype]] != total(checked):
            raise LayoutMismatch(f"{dtype}{list(shape)} does not describe {total(checked)} bytes")
        path = self.file(key)
        if key in self._published:
            raise ValueError(f"{key!r} is published already: withdraw it first")
        publication = Publication(key, arena, checked, on_free, once=False)
        if ttl is not None:
            publication.expiry = asyncio.get_running_loop().call_later(ttl, self.withdraw, key)
        self._published[key] = stored = Stored(publication, path, dtype, tuple(shape))
        try:
            await self._save(stored)
        except (asyncio.CancelledError, TransferError):
            self.withdraw(key)
            raise
        return {"transport": self.name, "key": key, "nbytes": total(checked)}

    def fulfil(self, key: str) -> None:
        raise LookupError(f"nothing is promised in files, {key!r} neither")

    async def restore(self, key: str) -> None:
        stored = self._published.get(key)
        if stored is not None and not await asyncio.to_thread(stored.path.exists):
            logger.info("%s was removed: writing it again", stored.path)
            await self._save(stored)

    async def _save(self, stored: Stored) -> None:
        stored.publication.readers += 1
        # owned by us: the thread reads the arena to its end even if the caller is cancelled
        await asyncio.shield(self.tasks.spawn(self._write(stored)))

    async def _write(self, stored: Stored) -> None:
        publication = stored.publication
        try:
            await asyncio.to_thread(
                save, stored.path, publication.arena.buffer, publication.spans, stored.dtype, stored.shape
            )
        except OSError as error:
            raise TransferError(f"cannot write {stored.path}: {error}") from None
        finally:
            publication.read()

    def withdraw(self, key: str) -> None:
        stored = self._published.pop(key, None)
        if stored is not None:
            stored.publication.end()

    def reserve(self, arena: Arena, spans: Spans, *, timeout: float, on_free: Callable[[], None]) -> StorageTicket:
        ticket = StorageTicket(self, arena, spans, timeout, on_free)
        self._tickets[ticket.id] = ticket
        return ticket

    async def open(self, offer: Mapping[str, Any], *, timeout: float) -> Any:
        raise TransferError("the storage transport carries no KV: choose shm, mooncake or zmq")

    def audit(self) -> dict[str, int]:
        held = [ticket for ticket in self._tickets.values() if ticket.state is TicketState.QUARANTINED]
        return {
            "tickets": len(self._tickets) - len(held),
            "publications": len(self._published),
            "pushes": 0,
            "quarantined_bytes": sum(ticket.nbytes for ticket in held),
        }

    def forget(self, ticket: StorageTicket) -> None:
        del self._tickets[ticket.id]

    def read(self, where: Mapping[str, Any]) -> Where:
        """A handle of ours. Raises LayoutMismatch."""
        try:
            handle = msgspec.convert(where, Where)
        except msgspec.ValidationError as error:
            raise LayoutMismatch(f"malformed handle: {error}") from None
        if handle.transport != self.name:
            raise LayoutMismatch(f"the handle is for {handle.transport}, this transfer reads files")
        return handle

    def file(self, key: str) -> Path:
        """Where the tensor of that key is: always in our own folder, whatever a handle says."""
        if not KEY.fullmatch(key):
            raise LayoutMismatch(f"{key!r} is no mm_hash: storage keys are 64 lowercase hex digits")
        return self._path / key / FILE


def create(*, host: str, advertise: str, timeout: float, rdma: bool, storage_path: Path | str | None) -> Storage:
    if storage_path is None:
        raise ValueError("the storage transport needs a storage path")
    return Storage(Path(storage_path), advertise)
