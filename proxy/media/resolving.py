"""From a host that a client named to the address that is connected to: the one that was checked.

A name that changes its mind between the check and the connection (DNS rebinding) gains nothing, since it is asked once
for both. It is asked in threads of their own, so that a name server which lets us wait holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from socket import SOCK_STREAM, getaddrinfo
from typing import TypeAlias

from proxy.errors import ForbiddenMedia
from proxy.media.addresses import Rules

Lookup: TypeAlias = Callable[[str, int], Awaitable[list[str]]]
"""All addresses of a host, for connections to a port. Raises OSError where there is none."""

_THREADS = 8


class Resolver:
    """What `proxy.http.client` resolves with where clients choose the host."""

    def __init__(self, rules: Rules, lookup: Lookup | None = None) -> None:
        """`lookup`: None asks the system."""
        self.rules = rules
        self._threads = ThreadPoolExecutor(_THREADS, "names")  # none is started before it is needed
        self._lookup = lookup or self._system

    async def __call__(self, host: str, port: int) -> str:
        """The first address of `host`, if media may come from all. Raises ForbiddenMedia, OSError."""
        found = await self._lookup(host, port)
        if not found or not all(map(self.rules.reachable, found)):
            raise ForbiddenMedia("media may not come from this host's address (--media-networks)")
        return found[0]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _system(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(self._threads, lambda: getaddrinfo(host, port, type=SOCK_STREAM))
        return [str(info[4][0]) for info in infos]
