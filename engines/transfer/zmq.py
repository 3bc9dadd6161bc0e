"""Bytes as ZMQ frames over a data socket; works between any two machines that can connect. One copy at the receiver.

    sender's DEALER ── [header, payload] … ──▶ receiver's ROUTER thread: is the ticket open? inside its spans? copy
                    ◀──────── [ack] ─────────

A batch of moves up to `BATCH` bytes is one message of two frames: which spans, and all their bytes. `WINDOW` batches
are under way at a time. Only the receiver's own thread writes into its arena, so closing the ticket there is proof that
no byte arrives any more: nothing is ever quarantined at the receiver.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from engines.transfer.base import (
    Address,
    Arena,
    LayoutMismatch,
    PeerFailed,
    PeerUnreachable,
    TransferError,
    TransportUnavailable,
)
from engines.transfer.endpoint import Endpoint
from engines.transfer.messages import Hex, Size
from engines.transfer.plane import Ask, Halt, Unsettled
from engines.transfer.spans import Moves, Region, Table, table, total

logger = logging.getLogger(__name__)

BATCH = 1 << 20
WINDOW = 4
POLL = 0.1
MAX_SPANS = 65536
DRAIN_TIMEOUT = 2.0


class Batch(msgspec.Struct, frozen=True):
    """The header of a payload: where its bytes go, in order."""

    ticket: Hex
    seq: Size
    spans: Annotated[list[tuple[Size, Size]], msgspec.Meta(max_length=MAX_SPANS)]


class Ack(msgspec.Struct, frozen=True):
    seq: Size
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HeapArena:
    name: str
    nbytes: int
    buffer: memoryview
    array: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class OpenTicket:
    arena: HeapArena
    region: Region


class ZmqPlane:
    name = "zmq"
    grace_ticks = 0

    def __init__(self, host: str) -> None:
        self._host = host
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._open: dict[str, OpenTicket] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._port = 0
        self.refused = 0
        """Batches that were dropped: garbage, no open ticket, or outside its spans."""

    def allocate(self, name: str, nbytes: int) -> Arena:
        array = np.zeros(nbytes, dtype=np.uint8)
        return HeapArena(name, nbytes, array.data, array)

    def start(self, address: Address, ask: Ask) -> None:
        self._context = zmq.Context()
        router = _socket(self._context, zmq.ROUTER, self._host)
        try:
            self._port = router.bind_to_random_port(f"tcp://{_bracket(self._host)}")
        except zmq.ZMQError as error:
            router.close()
            raise TransportUnavailable(f"cannot listen for tensor bytes on {self._host}: {error}") from None
        self._thread = threading.Thread(target=self._receive, args=(router,), name="transfer-zmq", daemon=True)
        self._thread.start()

    def describe(self, ticket: str, arena: Arena, spans: Table) -> dict[str, Any]:
        assert isinstance(arena, HeapArena)
        with self._lock:
            self._open[ticket] = OpenTicket(arena, Region(spans))
        return {"port": self._port, "ticket": ticket}

    def forget(self, ticket: str) -> None:
        with self._lock:  # held while a batch is copied: 0.3 ms for 1 MiB
            self._open.pop(ticket, None)

    def revoke(self, ticket: str, lost: bool) -> bool:
        self.forget(ticket)
        return True

    def connect(self, peer: Address, timeout: float) -> ZmqChannel:
        assert self._context is not None
        return ZmqChannel(self._context, peer)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        raise TransferError("the zmq transport has no questions")

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(DRAIN_TIMEOUT)
        if self._context is not None:
            # term waits for every socket, also one whose thread is stuck
            closer = threading.Thread(target=self._context.term, daemon=True)
            closer.start()
            closer.join(DRAIN_TIMEOUT)
            self._context = None

    def _receive(self, router: zmq.Socket[bytes]) -> None:
        decoder, encoder = msgspec.msgpack.Decoder(Batch), msgspec.msgpack.Encoder()
        try:
            while not self._stopping.is_set():
                if not router.poll(int(POLL * 1000)):
                    continue
                identity, *frames = router.recv_multipart(copy=False)
                try:
                    header, payload = frames
                    batch = decoder.decode(header.buffer)
                except (ValueError, msgspec.DecodeError, msgspec.ValidationError):
                    self.refused += 1
                    continue
                ack = Ack(batch.seq, self._apply(batch, payload.buffer))
                self.refused += bool(ack.error)
                router.send_multipart((identity.bytes, encoder.encode(ack)))
        except zmq.ContextTerminated:
            pass  # closed while this thread had no turn for as long as that waits
        finally:
            router.close()

    def _apply(self, batch: Batch, payload: memoryview) -> str:
        """Copy into the arena; why not, if it must not."""
        with self._lock:
            ticket = self._open.get(batch.ticket)
            if ticket is None:
                return "the ticket is not open any more"
            try:
                spans = table(batch.spans, ticket.arena.nbytes)
            except LayoutMismatch as error:
                return str(error)
            if not ticket.region.holds(spans):
                return "the batch goes outside the ticket's spans"
            if total(spans) != payload.nbytes:
                return "the payload does not have the length that its header says"
            done = 0
            source = np.frombuffer(payload, dtype=np.uint8)
            for offset, length in batch.spans:
                ticket.arena.array[offset : offset + length] = source[done : done + length]
                done += length
        return ""


class ZmqChannel:
    """A DEALER that is thrown away whenever batches were left unanswered, so that nothing refers to source memory."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: Address) -> None:
        self._context, self._peer = context, peer
        self._socket: zmq.Socket[bytes] | None = None
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Ack)
        self._seq = 0

    def write(self, source: Arena, region: Mapping[str, Any], moves: Moves, halt: Halt) -> None:
        assert isinstance(source, HeapArena)
        if self._socket is None:
            self._socket = self._connect(region.get("port"))
        unanswered: dict[int, zmq.MessageTracker] = {}
        try:
            for spans, payload in _batches(source, moves):
                while len(unanswered) >= WINDOW:
                    self._read_ack(self._socket, unanswered, halt)
                self._seq += 1
                header = self._encoder.encode(Batch(str(region.get("ticket")), self._seq, spans))
                unanswered[self._seq] = self._send(self._socket, header, payload, halt)
            while unanswered:
                self._read_ack(self._socket, unanswered, halt)
        except (TransferError, zmq.ZMQError) as error:
            self._forsake(unanswered)
            if isinstance(error, zmq.ZMQError):
                raise PeerFailed(f"sending to {self._peer} failed: {error}") from None
            raise

    def _connect(self, port: object) -> zmq.Socket[bytes]:
        if not isinstance(port, int) or not 0 < port < 65536:
            raise LayoutMismatch(f"{port!r} is no data port")
        socket = _socket(self._context, zmq.DEALER, self._peer.host)
        try:
            socket.connect(f"tcp://{_bracket(self._peer.host)}:{port}")
        except zmq.ZMQError as error:
            socket.close()
            raise PeerUnreachable(f"cannot reach {self._peer}: {error}") from None
        return socket

    @staticmethod
    def _send(socket: zmq.Socket[bytes], header: bytes, payload: memoryview, halt: Halt) -> zmq.MessageTracker:
        while not socket.poll(int(POLL * 1000), zmq.POLLOUT):
            halt.check()
        halt.check()
        socket.send(header, zmq.SNDMORE)
        tracker = socket.send(payload, copy=False, track=True)
        assert tracker is not None
        return tracker

    def _read_ack(self, socket: zmq.Socket[bytes], unanswered: dict[int, zmq.MessageTracker], halt: Halt) -> None:
        while not socket.poll(int(POLL * 1000)):
            halt.check()
        try:
            ack = self._decoder.decode(socket.recv())
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise PeerFailed(f"{self._peer} answered tensor bytes with garbage: {error}") from None
        unanswered.pop(ack.seq, None)
        if ack.error:
            raise PeerFailed(f"{self._peer} refused the bytes: {ack.error}")

    def _forsake(self, unanswered: dict[int, zmq.MessageTracker]) -> None:
        """Drop what is queued; Unsettled if ZMQ will not let go of the source memory."""
        self.close()
        end = time.monotonic() + DRAIN_TIMEOUT
        for tracker in unanswered.values():
            try:
                tracker.wait(max(0.0, end - time.monotonic()))
            except zmq.NotDone:
                raise Unsettled("ZMQ still holds the source memory") from None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def _batches(source: HeapArena, moves: Moves) -> Iterator[tuple[list[tuple[int, int]], memoryview]]:
    """Target spans and their bytes, at most `BATCH` each. One run of source is sent in place; several are gathered:
    a frame per 16 KiB block would take 34 ms for 16 MiB, gathering 8 ms."""
    pieces: list[tuple[int, int, int]] = []
    size = 0
    for start, to, length in _cut(moves):
        if size + length > BATCH or len(pieces) == MAX_SPANS:
            yield _pack(source, pieces)
            pieces, size = [], 0
        pieces.append((start, to, length))
        size += length
    if pieces:
        yield _pack(source, pieces)


def _cut(moves: Moves) -> Iterator[tuple[int, int, int]]:
    for start, to, length in moves.tolist():
        for done in range(0, length, BATCH):
            yield start + done, to + done, min(BATCH, length - done)


def _pack(source: HeapArena, pieces: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int]], memoryview]:
    spans = [(to, length) for _, to, length in pieces]
    if len(pieces) == 1:
        start, _, length = pieces[0]
        return spans, source.buffer[start : start + length]
    gathered = np.concatenate([source.array[start : start + length] for start, _, length in pieces])
    return spans, gathered.data


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, host: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 2 * WINDOW)
    socket.set(zmq.RCVHWM, 2 * WINDOW)
    socket.set(zmq.MAXMSGSIZE, 2 * BATCH + 32 * MAX_SPANS)
    socket.set(zmq.IPV6, int(":" in host))
    return socket


def create(*, host: str, advertise: str, timeout: float, rdma: bool, storage_path: Path | str | None) -> Endpoint:
    return Endpoint(ZmqPlane(host), host=host, advertise=advertise, timeout=timeout)
