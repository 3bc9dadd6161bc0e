"""Mooncake's TransferEngine as a plane: TCP here, RDMA only when asked for. Completion never rides on its notifies.

What it does when it fails was measured and decides the shape of this file:

- A write that ended with an error may still be applied later: the source thread of the library goes on sending. Hence
  `Unsettled`, and a session once lost is never used again. A polled write to a stopped peer just stays pending, and
  settles when the peer resumes, so we poll on until the library itself gives up.
- The receiver can shut a lost writer out: it opens a fresh session (an engine of its own) for new tickets and, when no
  live ticket uses the old one, destroys it; after that no byte can arrive through it.
- First contact with a peer that accepts but never answers blocks every thread for 60 s under an engine-wide lock.
  `send_probe` does not take that lock: it goes first, in a thread of its own.
- Destroying an engine holds the GIL for up to 1 s, so one engine that only sends lives as long as the process, and
  `close` unregisters and leaks instead of destroying.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engines.transfer.base import (
    Address,
    Arena,
    LayoutMismatch,
    PeerUnreachable,
    TransferCancelled,
    TransportUnavailable,
)
from engines.transfer.copying import move
from engines.transfer.endpoint import Endpoint
from engines.transfer.mooncake_channel import Lease, MooncakeArena, MooncakeChannel, Return, Scatter
from engines.transfer.plane import Ask
from engines.transfer.spans import Region, Table, total, unpack
from engines.transfer.staging import Slots, packed

logger = logging.getLogger(__name__)

PROBE_TIMEOUT = 2.0
SLOTS = 4

_immortal: list[Any] = []
"""Engines, and the memory their threads may look at, of closed planes."""


def load(rdma: bool) -> Any:
    """The library's TransferEngine class. Its settings are read once, when the first engine is made: before import."""
    if rdma and not any(Path("/sys/class/infiniband").glob("*")):
        raise TransportUnavailable("RDMA was asked for but this machine has no HCA (/sys/class/infiniband is empty)")
    settings = {
        "MC_FORCE_HCA" if rdma else "MC_FORCE_TCP": "1",
        "MC_TCP_ENABLE_CONNECTION_POOL": "1",
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_LOG_LEVEL": "ERROR",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)  # noqa: TID251 - the library has no other way to be told
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise TransportUnavailable(
            f"Mooncake cannot be loaded: {error}. Install it with `pip install 'triptych[mooncake]'` and its libraries "
            "with `apt-get install libibverbs1 libnuma1 libcurl4`, or use --transfer shm or zmq"
        ) from None
    return TransferEngine


def make_engine(host: str, rdma: bool) -> Any:
    engine = load(rdma)()
    # the protocol argument chooses nothing, the two MC_FORCE settings do
    if engine.initialize(host, "P2PHANDSHAKE", "rdma" if rdma else "tcp", "") != 0:
        raise TransportUnavailable(f"Mooncake could not start on {host} (rdma={rdma}): see its log on stderr")
    return engine


@dataclass(slots=True, eq=False)
class Session:
    """One engine that receives. `doomed`: its tickets whose writers we would like to shut out."""

    engine: Any
    id: str
    tickets: set[str] = field(default_factory=set)
    doomed: set[str] = field(default_factory=set)
    retired: bool = False
    dead: bool = False


@dataclass(frozen=True, slots=True)
class OpenTicket:
    session: Session
    arena: MooncakeArena
    region: Region


class MooncakePlane:
    name = "mooncake"
    grace_ticks = 8  # what a dead writer left in socket buffers is still applied

    def __init__(self, host: str, rdma: bool) -> None:
        load(rdma)
        self.host, self.rdma = host, rdma
        self.landing, self.staging = Slots(SLOTS), Slots(SLOTS)
        self.poisoned: set[str] = set()
        """Sessions of peers that lost a write of ours."""
        self.engine: Any = None
        self._arenas: list[MooncakeArena] = []
        self._session: Session | None = None
        self._sessions: list[Session] = []
        self._open: dict[str, OpenTicket] = {}
        self.ask: Ask | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def allocate(self, name: str, nbytes: int) -> Arena:
        array = np.zeros(nbytes, dtype=np.uint8)
        self._arenas.append(MooncakeArena(name, nbytes, array.data, array))
        return self._arenas[-1]

    def start(self, address: Address, ask: Ask) -> None:
        self.ask, self.loop = ask, asyncio.get_running_loop()
        self.engine = make_engine(self.host, self.rdma)
        self._register(self.engine, self.staging)
        self._session = self._open_session()

    def _register(self, engine: Any, slots: Slots) -> None:
        for array in [*(arena.array for arena in self._arenas), slots.array]:
            if array.nbytes and engine.register_memory(array.ctypes.data, array.nbytes) != 0:
                raise TransportUnavailable(f"Mooncake could not register {array.nbytes} bytes of memory")

    def _open_session(self) -> Session:
        engine = make_engine(self.host, self.rdma)
        self._register(engine, self.landing)
        session = Session(engine, f"{self.host}:{engine.get_rpc_port()}")
        self._sessions.append(session)
        return session

    # -- receiver

    def describe(self, ticket: str, arena: Arena, spans: Table) -> dict[str, Any]:
        assert isinstance(arena, MooncakeArena)
        assert self._session is not None
        self._session.tickets.add(ticket)
        self._open[ticket] = OpenTicket(self._session, arena, Region(spans))
        return {
            "session": self._session.id,
            "base": arena.address,
            "landing": self.landing.address,
            "slot": self.landing.size,
            "ticket": ticket,
        }

    def forget(self, ticket: str) -> None:
        opened = self._open.pop(ticket, None)
        if opened is not None:
            opened.session.tickets.discard(ticket)
            opened.session.doomed.discard(ticket)
            self.landing.give_back(ticket)
            self._destroy_if_unused(opened.session)

    def revoke(self, ticket: str, lost: bool) -> bool:
        opened = self._open.get(ticket)
        if opened is None:
            return True
        session = opened.session
        session.doomed.add(ticket)
        if lost and not session.retired:
            session.retired = True
            logger.warning("a peer lost a write to session %s: opening a fresh one", session.id)
            self._session = self._open_session()
        self._destroy_if_unused(session)
        return session.dead

    def _destroy_if_unused(self, session: Session) -> None:
        """Once nobody's live ticket needs it; in a thread, and the thread's end is the proof."""
        if session.retired and session.engine is not None and session.tickets <= session.doomed:
            engine, session.engine = session.engine, None
            threading.Thread(target=_destroy, args=([engine], session), name="transfer-destroy", daemon=True).start()
            self._sessions.remove(session)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            question = msgspec.convert(body, Lease | Scatter | Return)
        except msgspec.ValidationError as error:
            raise LayoutMismatch(f"malformed question: {error}") from None
        opened = self._open.get(question.ticket)
        if opened is None:
            raise TransferCancelled("the ticket is not open any more")
        match question:
            case Lease():
                return {"offsets": self.landing.lease(question.ticket, min(question.count, SLOTS // 2))}
            case Return():
                self.landing.give_back(question.ticket)
            case Scatter():
                await self._scatter(opened, question)
        return {}

    async def _scatter(self, opened: OpenTicket, scatter: Scatter) -> None:
        spans = unpack(scatter.spans, opened.arena.nbytes)
        if not self.landing.holds(scatter.ticket, scatter.offset) or total(spans) > self.landing.size:
            raise LayoutMismatch("the slot does not belong to this ticket")
        if not opened.region.holds(spans):
            raise LayoutMismatch("the scattered bytes go outside the ticket's spans")
        sources = packed(spans[:, 1], self.landing.address + scatter.offset)
        moves = np.stack((sources, opened.arena.address + spans[:, 0], spans[:, 1]), axis=1)
        await asyncio.to_thread(move, moves)

    # -- sender

    def connect(self, peer: Address, timeout: float) -> MooncakeChannel:
        return MooncakeChannel(self, peer)

    def probe(self, session: str, timeout: float) -> None:
        """Raises PeerUnreachable unless `session` answers in time. A hung one keeps its thread for a minute."""
        answered: list[int] = []
        thread = threading.Thread(
            target=lambda: answered.append(self.engine.send_probe(session)), name="transfer-probe", daemon=True
        )
        thread.start()
        thread.join(min(timeout, PROBE_TIMEOUT))
        if answered != [0]:
            raise PeerUnreachable(f"Mooncake session {session} {'refused' if answered else 'did not answer'}")

    def close(self) -> None:
        engines = [session.engine for session in self._sessions] + ([self.engine] if self.engine else [])
        for engine in engines:
            for array in [*(arena.array for arena in self._arenas), self.landing.array, self.staging.array]:
                engine.unregister_memory(array.ctypes.data)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # or interpreter exit destroys it, 1 s each
        if engines:
            _immortal.append((engines, self._arenas, self.landing.array, self.staging.array))
        self.engine, self._sessions = None, []


def _destroy(engines: list[Any], session: Session) -> None:
    engines.clear()
    session.dead = True


def create(*, host: str, advertise: str, timeout: float, rdma: bool, storage_path: Path | str | None) -> Endpoint:
    return Endpoint(MooncakePlane(advertise, rdma), host=host, advertise=advertise, timeout=timeout)
