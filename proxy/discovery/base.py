"""The contract of whatever finds engines behind a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from proxy.settings.endpoint import Endpoint

Say: TypeAlias = Callable[[Iterable[str]], None]
"""Takes all engines that are behind a name now, as host:port. Whoever is missing is gone."""


class Unreadable(Exception):
    """Nobody knows who is behind the name now: what was said last stands."""


class Finder(Protocol):
    """One for a word and all its names."""

    async def watch(self, endpoint: Endpoint, say: Say) -> None:
        """Call `say` at once, and again whenever it may have changed. It may end, and is then called again.

        Raises Unreadable; then too it is called again, a while later.
        """
        raise NotImplementedError


def joined(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
