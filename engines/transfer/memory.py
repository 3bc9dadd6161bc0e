"""Within one process: for unit tests. The control channel is the real one; only the copy is a plain one.

`transfer.plane.script = hook` runs `hook(moves)` in the peer's sender thread before each write: it may wait, raise a
TransferError (settled: nothing was written) or raise `Unsettled` (after which `plane.land()` applies the late bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.transfer.base import Address, Arena, PeerUnreachable
from engines.transfer.endpoint import Endpoint
from engines.transfer.plane import Ask, Halt, Unsettled
from engines.transfer.spans import Moves, Table

_planes: dict[str, MemoryPlane] = {}
"""Started planes by nonce: this process is the network."""


@dataclass(frozen=True, slots=True, eq=False)
class MemoryArena:
    name: str
    nbytes: int
    buffer: memoryview


class MemoryPlane:
    name = "memory"
    grace_ticks = 0

    def __init__(self) -> None:
        self.arenas: dict[str, MemoryArena] = {}
        self.script: Callable[[Moves], None] | None = None
        self.late: list[Callable[[], None]] = []
        self.revocable = False
        """True: this receiver can shut out a writer that said "lost"."""
        self._nonce = ""

    def allocate(self, name: str, nbytes: int) -> Arena:
        self.arenas[name] = MemoryArena(name, nbytes, memoryview(bytearray(nbytes)))
        return self.arenas[name]

    def start(self, address: Address, ask: Ask) -> None:
        self._nonce = address.nonce
        _planes[address.nonce] = self

    def describe(self, ticket: str, arena: Arena, spans: Table) -> dict[str, Any]:
        return {"arena": arena.name}

    def forget(self, ticket: str) -> None:
        pass

    def revoke(self, ticket: str, lost: bool) -> bool:
        return lost and self.revocable

    def connect(self, peer: Address, timeout: float) -> MemoryChannel:
        if peer.nonce not in _planes:
            raise PeerUnreachable(f"{peer} is not in this process")
        return MemoryChannel(self, _planes[peer.nonce])

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return body

    def land(self) -> None:
        """Apply the bytes of unsettled writes, late."""
        late, self.late = self.late, []
        for copy in late:
            copy()

    def close(self) -> None:
        _planes.pop(self._nonce, None)


class MemoryChannel:
    def __init__(self, ours: MemoryPlane, theirs: MemoryPlane) -> None:
        self._ours, self._theirs = ours, theirs

    def write(self, source: Arena, region: Mapping[str, Any], moves: Moves, halt: Halt) -> None:
        target = self._theirs.arenas[region["arena"]]
        try:
            if self._ours.script is not None:
                self._ours.script(moves)
        except Unsettled:
            self._ours.late.append(lambda: _copy(source, target, moves))
            raise
        halt.check()
        _copy(source, target, moves)

    def close(self) -> None:
        pass


def _copy(source: Arena, target: Arena, moves: Moves) -> None:
    for start, to, length in moves.tolist():
        target.buffer[to : to + length] = source.buffer[start : start + length]


def create(*, host: str, advertise: str, timeout: float, rdma: bool, storage_path: Path | str | None) -> Endpoint:
    return Endpoint(MemoryPlane(), host=host, advertise=advertise, timeout=timeout)
