"""What a transport must supply: arenas, a description of them for senders, and a write. No tickets, no control.

Everything about promises, deadlines, peers' deaths and quarantine is in `endpoint`, `receiving` and `sending`, once.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from engines.transfer.base import Address, Arena
from engines.transfer.spans import Moves, Table

Ask = Callable[[Address, dict[str, Any], float], Coroutine[Any, Any, dict[str, Any]]]
"""Put a transport's own question to a peer's plane: (peer, body, timeout) → answer. On the loop."""


class Unsettled(Exception):
    """A write ended and bytes may still move: both sides' memory is in quarantine until a proof."""


class Halt(Protocol):
    """How a running write learns that it should end. Thread-safe."""

    @property
    def deadline(self) -> float:
        """On the time.monotonic clock."""

    def check(self) -> None:
        """Raise TransferCancelled or TransferTimeout if the push should stop; call it between pieces of work."""


class Channel(Protocol):
    """A sender's way to one process life. Used by that peer's one thread."""

    def write(self, source: Arena, region: Mapping[str, Any], moves: Moves, halt: Halt) -> None:
        """Copy and return when the bytes are applied at the receiver. `region` comes from `Plane.describe`.

        Raises a TransferError if they are not and no byte moves any more; Unsettled if that cannot be said. After
        Unsettled the channel is closed and never used again. Must not hold the GIL while bytes move.
        """

    def close(self) -> None: ...


class Plane(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def grace_ticks(self) -> int:
        """Housekeeping ticks for which bytes of a dead writer may still be on their way into our memory."""

    def allocate(self, name: str, nbytes: int) -> Arena:
        """Raises TransferError when the memory cannot be had."""

    def start(self, address: Address, ask: Ask) -> None:
        """Called on the loop after all `allocate` calls; `address` is ours. Raises TransportUnavailable."""

    def describe(self, ticket: str, arena: Arena, spans: Table) -> dict[str, Any]:
        """JSON-able: how a sender reaches these spans. The ticket is open for writing from now on."""

    def forget(self, ticket: str) -> None:
        """No write into the ticket is expected any more. Unknown tickets are ignored."""

    def revoke(self, ticket: str, lost: bool) -> bool:
        """Try to shut the writer out by our means alone; True once none of its bytes can arrive any more.

        `lost`: the writer said that its write is unsettled. Called again every tick; must not block.
        """

    def connect(self, peer: Address, timeout: float) -> Channel:
        """In the peer's sender thread, within `timeout` seconds. Raises PeerUnreachable."""

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A peer's question to this plane. Raises TransferError; the body is not validated."""

    def close(self) -> None:
        """Remove what was made on the system. Idempotent, bounded."""
