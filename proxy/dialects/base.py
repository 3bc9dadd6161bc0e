"""What a dialect must be able to say. Bodies in, bodies out: no HTTP, no waiting, no choice of instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from proxy.core import Body, Handle, Item, Job, Order

Handles = Mapping[int, Handle]
"""By item index: where each item's embedding is."""


class BadReply(ValueError):
    """A reply with a success status that does not hold what the next stage needs."""


class Dialect(Protocol):
    """One engine family. Every method returns a new body and leaves its arguments as they were; all are pure.

    Bodies keep the client's unknown fields and the order of its keys. Raises BadRequest where the family cannot do
    what the client asks.
    """

    name: str
    order: Order  # how this family's prefill and decode are sent

    def encode(self, job: Job, items: Sequence[Item]) -> Body:
        """To an encoder: these items and nothing else of the conversation."""

    def read_encode(self, items: Sequence[Item], reply: Body) -> dict[int, Handle]:
        """One handle for each of `items`, which `encode` was called with. Raises BadReply."""

    def blame(self, items: Sequence[Item], param: str | None) -> str | None:
        """An encoder's `error.param` in the client's own positions; anything else unchanged."""

    def prefill(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None) -> Body:
        """To a prefill engine. `handoff` is the decode engine's descriptor in DECODE_FIRST, else None."""

    def read_prefill(self, reply: Body) -> Mapping[str, Any]:
        """What decode needs in SEQUENTIAL, to be passed on verbatim. Raises BadReply."""

    def decode(self, job: Job, handles: Handles, handoff: Mapping[str, Any] | None, metaserver: str) -> Body:
        """To a decode engine. `handoff` is what `read_prefill` gave in SEQUENTIAL; else it calls `metaserver`."""

    def whole(self, job: Job, handles: Handles) -> Body:
        """To a combined engine, which prefills and decodes; it encodes the items that have no handle."""
