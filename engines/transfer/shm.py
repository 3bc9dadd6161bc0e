"""POSIX shared memory on one machine: the sender maps the receiver's arena and copies once. Never leaves the machine.

Segments are files in /dev/shm, made by hand: `multiprocessing.shared_memory` hands them to a resource tracker that
unlinks what another process still uses and warns about it at exit. The name says whose they are, so that whoever
starts next can sweep away those of dead processes:

    triptych-<machine>-<pid>-<start time>-<random>
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.transfer.base import Address, Arena, LayoutMismatch, PeerUnreachable, TransferError
from engines.transfer.copying import address_of, copy
from engines.transfer.endpoint import Endpoint
from engines.transfer.liveness import machine, started
from engines.transfer.plane import Ask, Halt
from engines.transfer.spans import Moves, Table

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
NAME = re.compile(r"triptych-(?P<machine>[0-9a-f]{16})-(?P<pid>[0-9]{1,10})-(?P<started>[0-9]{1,20})-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, eq=False)
class ShmArena:
    name: str
    nbytes: int
    buffer: memoryview
    segment: str
    address: int


def sweep(folder: Path = FOLDER) -> list[str]:
    """Unlink segments of this machine's dead processes; the names of those removed."""
    removed = []
    for path in folder.glob("triptych-*"):
        owner = NAME.fullmatch(path.name)
        if owner is None or owner["machine"] != machine() or started(int(owner["pid"])) == int(owner["started"]):
            continue
        with contextlib.suppress(OSError):  # another one sweeps too, or it belongs to another user
            path.unlink()
            removed.append(path.name)
    if removed:
        logger.info("removed %d shared memory segments of dead processes", len(removed))
    return removed


class ShmPlane:
    name = "shm"
    grace_ticks = 0  # bytes move only while the writer's thread runs

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._segments: list[Path] = []
        sweep(folder)

    def allocate(self, name: str, nbytes: int) -> Arena:
        segment = f"triptych-{machine()}-{os.getpid()}-{started(os.getpid())}-{secrets.token_hex(8)}"
        path = self._folder / segment
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._segments.append(path)
        try:
            # reserve now: a full /dev/shm would otherwise be a SIGBUS at the first touch
            os.posix_fallocate(descriptor, 0, nbytes)
            mapping = mmap.mmap(descriptor, nbytes)
        except OSError as error:
            path.unlink()
            hint = "free space there or enlarge it (docker run --shm-size=…)" if error.errno == errno.ENOSPC else ""
            raise TransferError(f"no {nbytes} bytes of shared memory in {self._folder}: {error}. {hint}") from None
        finally:
            os.close(descriptor)
        buffer = memoryview(mapping)
        return ShmArena(name, nbytes, buffer, segment, address_of(buffer))

    def start(self, address: Address, ask: Ask) -> None:
        pass

    def describe(self, ticket: str, arena: Arena, spans: Table) -> dict[str, Any]:
        assert isinstance(arena, ShmArena)
        return {"segment": arena.segment}

    def forget(self, ticket: str) -> None:
        pass

    def revoke(self, ticket: str, lost: bool) -> bool:
        return False  # whoever has mapped the arena can write until it stops or dies

    def connect(self, peer: Address, timeout: float) -> ShmChannel:
        if peer.machine != machine():
            raise PeerUnreachable(f"{peer} is on another machine: shared memory reaches only this one")
        return ShmChannel(self._folder)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        raise TransferError("shared memory has no questions")

    def close(self) -> None:
        # the mapping goes with its last user: a tensor may still look at it
        for path in self._segments:
            path.unlink(missing_ok=True)
        self._segments.clear()


class ShmChannel:
    """The peer's arenas, mapped once each. `map_segment` trusts nothing in a description."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[str, tuple[memoryview, int]] = {}

    def write(self, source: Arena, region: Mapping[str, Any], moves: Moves, halt: Halt) -> None:
        assert isinstance(source, ShmArena)
        if not len(moves):
            return
        buffer, address = self._map(region.get("segment"))
        if int((moves[:, 1] + moves[:, 2]).max()) > buffer.nbytes:
            raise LayoutMismatch(f"the peer's segment has only {buffer.nbytes} bytes")
        copy(source.address, address, moves, halt)

    def _map(self, segment: object) -> tuple[memoryview, int]:
        if not isinstance(segment, str) or not NAME.fullmatch(segment):
            raise LayoutMismatch(f"{segment!r} does not name a shared memory segment")
        if segment not in self._mapped:
            try:
                descriptor = os.open(self._folder / segment, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise PeerUnreachable(
                    f"cannot open the peer's shared memory {segment}: {error}. Both engines must run as one user and "
                    f"share {self._folder}"
                ) from None
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise LayoutMismatch(f"{segment} is not a shared memory segment")
                buffer = memoryview(mmap.mmap(descriptor, 0))
            finally:
                os.close(descriptor)
            self._mapped[segment] = buffer, address_of(buffer)
        return self._mapped[segment]

    def close(self) -> None:
        self._mapped.clear()


def create(*, host: str, advertise: str, timeout: float, rdma: bool, storage_path: Path | str | None) -> Endpoint:
    return Endpoint(ShmPlane(), host=host, advertise=advertise, timeout=timeout)
