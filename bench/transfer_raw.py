"""The yardsticks of `bench.transfer`: memcpy, raw loopback TCP, and Mooncake used directly. No ticket, no safety."""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Spans = list[tuple[int, int]]
Bytes = npt.NDArray[np.uint8]
Use = Callable[[Spans, Spans, int], None]
"""(source, target, times)"""
IOV_MAX = 1024
HEADER = struct.Struct("<cI")
TCP, SCATTER, NOTHING = b"T", b"S", b"N"


def ordinary(nbytes: int, value: int) -> Bytes:
    """Memory of ordinary pages, as torch allocates it; numpy would ask for huge ones, which shared memory has not."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    memory[:] = value
    return memory


def memcpy(nbytes: int) -> Use:
    """Within one process, from one buffer of `nbytes` to another."""
    source, target = ordinary(nbytes, 7), ordinary(nbytes, 0)

    def copy(sources: Spans, targets: Spans, times: int) -> None:
        a, b = source.ctypes.data, target.ctypes.data
        for _ in range(times):
            for (start, length), (to, _) in zip(sources, targets, strict=True):
                ctypes.memmove(b + to, a + start, length)

    return copy


def iovecs(buffer: memoryview, spans: Spans) -> Iterator[list[memoryview]]:
    for first in range(0, len(spans), IOV_MAX):
        yield [buffer[offset : offset + length] for offset, length in spans[first : first + IOV_MAX]]


def move_all(call: Callable[[list[memoryview]], int], pieces: list[memoryview]) -> None:
    """Repeat a scatter-gather call until every byte of `pieces` has gone."""
    while pieces:
        moved = call(pieces)
        if moved == 0:
            raise ConnectionError("the other end is gone")
        while pieces and moved >= pieces[0].nbytes:
            moved -= pieces.pop(0).nbytes
        if moved:
            pieces[0] = pieces[0][moved:]


@dataclass(frozen=True)
class RawPeer:
    """How to reach a RawReceiver."""

    port: int
    session: str | None
    base: int
    landing: int


class RawReceiver:
    """One buffer and one connection; every request is answered with one byte when it is done."""

    def __init__(self, nbytes: int, mooncake: bool) -> None:
        self._array, self._landing = np.zeros(nbytes, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
        self._engine = _engine(self._array, self._landing) if mooncake else None
        self._server = socket.create_server(("127.0.0.1", 0))
        session = f"127.0.0.1:{self._engine.get_rpc_port()}" if self._engine else None
        self.peer = RawPeer(self._server.getsockname()[1], session, self._array.ctypes.data, self._landing.ctypes.data)

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.close()

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while header := connection.recv(HEADER.size, socket.MSG_WAITALL):
                kind, count = HEADER.unpack(header)
                flat = np.frombuffer(connection.recv(16 * count, socket.MSG_WAITALL) or b"", dtype=np.int64)
                spans: Spans = [(offset, length) for offset, length in flat.reshape(-1, 2).tolist()]
                if kind == TCP:
                    for pieces in iovecs(self._array.data, spans):
                        move_all(lambda buffers: connection.recvmsg_into(buffers)[0], pieces)
                elif kind == SCATTER:
                    self._scatter(spans)
                connection.sendall(b".")

    def _scatter(self, spans: Spans) -> None:
        at, base = self._landing.ctypes.data, self._array.ctypes.data
        for offset, length in spans:
            ctypes.memmove(base + offset, at, length)
            at += length


class RawSender:
    """`tcp` and the uses in `mooncake` move spans of one buffer into the receiver's."""

    def __init__(self, peer: RawPeer, nbytes: int) -> None:
        self._peer = peer
        self._array, self._staging = np.full(nbytes, 7, dtype=np.uint8), np.zeros(nbytes, dtype=np.uint8)
        self._socket = socket.create_connection(("127.0.0.1", peer.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._engine = _engine(self._array, self._staging) if peer.session else None
        self.mooncake: dict[str, Use] = {"sync": self._sync, "polled": self._polled, "gathered": self._gathered}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def tcp(self, sources: Spans, targets: Spans, times: int) -> None:
        for _ in range(times):
            self._request(TCP, targets)
            for pieces in iovecs(self._array.data, sources):
                move_all(self._socket.sendmsg, pieces)
        for _ in range(times):
            self._answer()

    def _request(self, kind: bytes, spans: Spans) -> None:
        self._socket.sendall(HEADER.pack(kind, len(spans)) + np.array(spans, dtype=np.int64).tobytes())

    def _answer(self) -> None:
        if not self._socket.recv(1):
            raise ConnectionError("the receiver is gone")

    def _sync(self, sources: Spans, targets: Spans, times: int) -> None:
        """One blocking batch."""
        assert self._engine is not None
        ours, theirs, lengths = self._lists(sources, targets)
        for _ in range(times):
            if self._engine.batch_transfer_sync_write(self._peer.session, ours, theirs, lengths) != 0:
                raise RuntimeError("Mooncake failed")
        self._request(NOTHING, [])
        self._answer()

    def _polled(self, sources: Spans, targets: Spans, times: int) -> None:
        """A descriptor per block, polled."""
        moves = list(zip(*self._lists(sources, targets), strict=True))
        for _ in range(times):
            self._write(moves)
        self._request(NOTHING, [])
        self._answer()

    def _gathered(self, sources: Spans, targets: Spans, times: int) -> None:
        """Copied together, one write, copied apart."""
        for _ in range(times):
            self._gather_one(sources, targets)

    def _gather_one(self, sources: Spans, targets: Spans) -> None:
        at = self._staging.ctypes.data
        for offset, length in sources:
            ctypes.memmove(at, self._array.ctypes.data + offset, length)
            at += length
        start = self._staging.ctypes.data
        self._write([(start, self._peer.landing, at - start)])
        self._request(SCATTER, targets)
        self._answer()

    def _lists(self, sources: Spans, targets: Spans) -> tuple[list[int], list[int], list[int]]:
        base = self._array.ctypes.data
        ours, theirs = [base + offset for offset, _ in sources], [self._peer.base + offset for offset, _ in targets]
        return ours, theirs, [length for _, length in sources]

    def _write(self, moves: Any) -> None:
        engine = self._engine
        assert engine is not None
        handles = [engine.transfer_submit_write(self._peer.session, *move) for move in moves]
        for handle in handles:
            while (status := engine.transfer_check_status(handle)) == 0:
                time.sleep(20e-6)
            if status != 1:
                raise RuntimeError("Mooncake failed")


def _engine(*arrays: Any) -> Any:
    """A TransferEngine of its own, with our settings, that is never destroyed: that takes up to 1 s."""
    from engines.transfer.mooncake import make_engine

    engine = make_engine("127.0.0.1", rdma=False)
    for array in arrays:
        if engine.register_memory(array.ctypes.data, array.nbytes) != 0:
            raise RuntimeError("Mooncake could not register memory")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    return engine
