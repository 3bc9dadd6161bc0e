"""Proof that a process life is over. Silence proves nothing: a stopped process may write the moment it resumes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from functools import cache
from pathlib import Path

from engines.transfer.base import Address
from engines.transfer.tasks import Tasks

PROBE_INTERVAL = 1.0


@cache
def machine() -> str:
    """Equal for two processes exactly if they see each other's pids.

    The boot id alone is not enough: containers of one host share it but not the pid namespace, and "no such pid" would
    then be taken for a death.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def started(pid: int) -> int | None:
    """Start time in clock ticks since boot, which tells a reused pid apart; None if the process is over.

    A zombie is over once its threads are: a leader that was killed reads as Z while siblings still run.
    """
    try:
        # the command, field 2, is in parentheses and may itself hold spaces and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1:  # noqa: PTH208 - names only
            return None
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def here(host: str, port: int) -> Address:
    """The address of this process life, with a fresh nonce."""
    return Address(host, port, secrets.token_hex(16), machine(), os.getpid(), started(os.getpid()) or 0)


def process_over(peer: Address) -> bool:
    """True only if `peer` is of this machine and its process is gone."""
    return peer.machine == machine() and peer.pid > 0 and started(peer.pid) != peer.started


async def port_refuses(peer: Address, timeout: float) -> bool:
    """True if the control port of `peer` refuses connections: the process that listened there is gone."""
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(peer.host.strip("[]"), peer.port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return False


class Deaths:
    """What is proved about other process lives, asked from synchronous code.

    A peer of this machine is looked up at once. For one elsewhere the answer is that of the last probe of its control
    port, and a new probe starts in the background: a host that swallows packets delays nobody.
    """

    def __init__(self, tasks: Tasks, timeout: float) -> None:
        self._tasks, self._timeout = tasks, timeout
        self._over: dict[str, bool] = {}
        self._next_probe: dict[str, float] = {}

    def over(self, peer: Address) -> bool:
        if self._over.get(peer.nonce):
            return True
        if peer.machine == machine():
            return process_over(peer)
        now = time.monotonic()
        if now >= self._next_probe.get(peer.nonce, 0.0):
            self._next_probe[peer.nonce] = now + self._timeout + PROBE_INTERVAL
            self._tasks.spawn(self._probe(peer))
        return False

    async def _probe(self, peer: Address) -> None:
        if await port_refuses(peer, self._timeout):
            self.note(peer)
        self._next_probe[peer.nonce] = time.monotonic() + PROBE_INTERVAL

    def note(self, peer: Address) -> None:
        """Somebody else proved it: another process life answered in its place."""
        self._over[peer.nonce] = True

    def retain(self, nonces: set[str]) -> None:
        """Forget everybody else."""
        self._over = {nonce: over for nonce, over in self._over.items() if nonce in nonces}
        self._next_probe = {nonce: when for nonce, when in self._next_probe.items() if nonce in nonces}
