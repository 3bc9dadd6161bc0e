"""How late the event loop is: the one thing that delays every request of a worker at once. Nothing is mended here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_EVERY_S = 0.25


async def watch(observe: Callable[[float], None]) -> None:
    """Tell `observe`, four times a second until cancelled, by how many seconds a timer was called too late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _EVERY_S
        await asyncio.sleep(_EVERY_S)
        observe(max(0.0, loop.time() - due))
