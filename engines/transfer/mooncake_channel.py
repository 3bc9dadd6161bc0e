"""A sender's way through Mooncake to one peer: polled writes, piece by piece or through staging slots.

The receiving and the library's life are in `mooncake`; no ticket is decided about here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from engines.transfer.base import Address, Arena, LayoutMismatch, PeerFailed, TransferError
from engines.transfer.copying import move
from engines.transfer.messages import Hex, Size
from engines.transfer.plane import Halt, Unsettled
from engines.transfer.spans import Moves, pack
from engines.transfer.staging import batches, one_run, packed, worth_staging

if TYPE_CHECKING:
    from engines.transfer.mooncake import MooncakePlane

POLL, LONGEST_POLL = 20e-6, 300e-6
POLLS = 16
"""A write is looked at again after a sixteenth of the time it has taken: a thread that looks without a pause takes the
core that the library's own threads need."""
IN_FLIGHT = 512
"""Descriptors under way at a time; beyond about 2,000 to one peer the library fails them all."""
PIECE = 4 << 20
"""A long run goes in so many bytes at a time, the next queued behind the last: 16 MiB by TCP take a tenth less time."""
GATHERED = 2 << 20
"""A slot is filled and sent in pieces of this size, so that the first byte leaves early and the caches hold a piece."""
LANES = 2
"""Slots per write: one is gathered while the other travels."""
ASK_TIMEOUT = 5.0
PENDING, APPLIED = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class MooncakeArena:
    name: str
    nbytes: int
    buffer: memoryview
    array: npt.NDArray[np.uint8]

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)


class Target(msgspec.Struct, frozen=True):
    """Where a ticket's bytes go: absolute addresses in the receiver's process."""

    session: Annotated[str, msgspec.Meta(max_length=300)]
    base: Size
    landing: Size
    slot: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
    ticket: Hex


class Lease(msgspec.Struct, frozen=True, tag="lease", forbid_unknown_fields=True):
    """Sender to receiver: lend me up to `count` landing slots for this ticket."""

    ticket: Hex
    count: Annotated[int, msgspec.Meta(ge=1, le=64)]


class Scatter(msgspec.Struct, frozen=True, tag="scatter", forbid_unknown_fields=True):
    """Sender to receiver: the slot at `offset` holds the bytes of these spans (of `spans.pack`); copy them there."""

    ticket: Hex
    offset: Size
    spans: bytes


class Return(msgspec.Struct, frozen=True, tag="return", forbid_unknown_fields=True):
    ticket: Hex


class MooncakeChannel:
    def __init__(self, plane: MooncakePlane, peer: Address) -> None:
        self._plane, self._peer = plane, peer
        self._probed: set[str] = set()
        self._leases = itertools.count()

    def write(self, source: Arena, region: Mapping[str, Any], moves: Moves, halt: Halt) -> None:
        assert isinstance(source, MooncakeArena)
        try:
            target = msgspec.convert(dict(region), Target)
        except msgspec.ValidationError as error:
            raise LayoutMismatch(f"malformed region: {error}") from None
        self._contact(target.session, halt)
        moves = moves + np.array([source.address, target.base, 0], dtype=np.int64)
        # RDMA handles descriptors in hardware: copying twice to have fewer of them cannot win there
        if self._plane.rdma or not worth_staging(moves):
            self._direct(target, moves, halt)
        else:
            self._staged(target, moves, halt)

    def close(self) -> None:
        pass

    def _contact(self, session: str, halt: Halt) -> None:
        if session in self._plane.poisoned:
            raise PeerFailed(f"session {session} lost a write before; the receiver must make a new offer")
        if session not in self._probed:
            self._plane.probe(session, halt.deadline - time.monotonic())
            self._probed.add(session)

    def submit(self, target: Target, source: int, to: int, length: int) -> int:
        handle: int = self._plane.engine.transfer_submit_write(target.session, source, to, length)
        if handle == 0:
            self._plane.poisoned.add(target.session)
            raise Unsettled(f"Mooncake session {target.session} took no write")
        return handle

    def settle(self, target: Target, handles: list[int]) -> None:
        """Until each has ended, also after the deadline: a pending write may still move. Empties the list."""
        lost, began = 0, time.monotonic()
        while handles:
            # a handle is freed by the check that finds it ended: never look at it again
            status = self._plane.engine.transfer_check_status(handles[-1])
            if status == PENDING:
                time.sleep(min(max(POLL, (time.monotonic() - began) / POLLS), LONGEST_POLL))
                continue
            handles.pop()
            lost += status != APPLIED
        if lost:
            self._plane.poisoned.add(target.session)
            raise Unsettled(f"{lost} writes through Mooncake session {target.session} failed")

    def ask(self, question: Lease | Scatter | Return) -> concurrent.futures.Future[dict[str, Any]]:
        plane = self._plane
        assert plane.ask is not None
        assert plane.loop is not None
        body = msgspec.to_builtins(question, builtin_types=(bytes,))
        return asyncio.run_coroutine_threadsafe(plane.ask(self._peer, body, ASK_TIMEOUT), plane.loop)

    def _direct(self, target: Target, moves: Moves, halt: Halt) -> None:
        running: list[int] = []
        try:
            for source, to, length in moves.tolist():
                for done in range(0, length, PIECE):
                    halt.check()
                    if len(running) >= IN_FLIGHT:
                        self.settle(target, running)
                    running.append(self.submit(target, source + done, to + done, min(PIECE, length - done)))
        finally:
            self.settle(target, running)

    def _staged(self, target: Target, moves: Moves, halt: Halt) -> None:
        owner = f"{self._peer.nonce}-{next(self._leases)}"
        ours = self._plane.staging.lease(owner, LANES)
        try:
            lease = self.ask(Lease(target.ticket, LANES))
            slots = batches(moves, min(self._plane.staging.size, target.slot))  # while it travels
            theirs = lease.result().get("offsets", [])
            lanes = [Lane(mine, offset) for mine, offset in zip(ours, theirs, strict=False) if isinstance(offset, int)]
            if lanes:
                Staged(self, target, lanes, self._plane.staging.address).run(slots, halt)
                self.ask(Return(target.ticket))
            else:
                self._direct(target, moves, halt)
        finally:
            self._plane.staging.give_back(owner)


@dataclass(slots=True)
class Lane:
    """One slot here and one there.

    `writes` are under way between them, `spans` say where the receiver shall copy what they bring, `scatter` is its
    doing so.
    """

    ours: int
    theirs: int
    writes: list[int] = field(default_factory=list)
    spans: bytes = b""
    scatter: concurrent.futures.Future[dict[str, Any]] | None = None

    def free(self) -> None:
        """Until the receiver has copied. Raises Unsettled if it does not say so: it may be copying still."""
        scatter, self.scatter = self.scatter, None
        if scatter is not None:
            try:
                scatter.result()
            except (TransferError, concurrent.futures.CancelledError) as error:
                raise Unsettled(f"the receiver did not empty a landing slot: {error}") from None


class Staged:
    """Gather, write, scatter: each slot's bytes are gathered while those of the slot before travel."""

    def __init__(self, channel: MooncakeChannel, target: Target, lanes: list[Lane], staging: int) -> None:
        self._channel, self._target, self._lanes, self._staging = channel, target, lanes, staging

    def run(self, slots: list[Moves], halt: Halt) -> None:
        lanes = self._lanes
        try:
            for index, moves in enumerate(slots):
                halt.check()
                lane, before = lanes[index % len(lanes)], lanes[(index - 1) % len(lanes)]
                self._land(lane)
                lane.free()
                self._send(lane, moves, before)
            for lane in lanes:
                self._land(lane)
        finally:
            self._channel.settle(self._target, [handle for lane in lanes for handle in lane.writes])
            for lane in lanes:
                lane.free()

    def _send(self, lane: Lane, moves: Moves, before: Lane) -> None:
        """Submit what one slot holds; the lane before lands when the first piece is queued behind it."""
        apart = not one_run(moves[:, 1], moves[:, 2])
        to = self._target.landing + lane.theirs if apart else int(moves[0, 1])
        for source, length in self._gathered(lane, moves):
            lane.writes.append(self._channel.submit(self._target, source, to, length))
            to += length
            self._land(before)
        if apart:
            lane.spans = pack(moves[:, 1:] - np.array([self._target.base, 0]))

    def _gathered(self, lane: Lane, moves: Moves) -> Iterator[tuple[int, int]]:
        """(address, length) of their bytes in order, copied together one piece after the other unless they lie so."""
        if one_run(moves[:, 0], moves[:, 2]):
            yield int(moves[0, 0]), int(moves[:, 2].sum())
            return
        together = packed(moves[:, 2], self._staging + lane.ours)
        for piece in batches(np.stack((moves[:, 0], together, moves[:, 2]), axis=1), GATHERED):
            move(piece)
            yield int(piece[0, 1]), int(piece[:, 2].sum())

    def _land(self, lane: Lane) -> None:
        """Its writes have ended; have the receiver scatter them, unless they went to their place at once."""
        self._channel.settle(self._target, lane.writes)
        if lane.spans:
            spans, lane.spans = lane.spans, b""
            lane.scatter = self._channel.ask(Scatter(self._target.ticket, lane.theirs, spans))
