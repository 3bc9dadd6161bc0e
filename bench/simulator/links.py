"""What bytes cost between machines: received one transfer after the other, once for every GPU that needs a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    per_byte: float  # seconds, for each rank of the receiver
    latency: float = 1e-3

    def seconds(self, nbytes: int, ranks: int) -> float:
        """That the receiver's end is taken for; the latency comes on top, for nobody else."""
        return nbytes * ranks * self.per_byte


RDMA = Link(1 / 25e9)  # 20 to 40 GB/s and about 1 ms: Mooncake over RoCE or NVLink
PICKLED = Link(1.6e-9)  # embeddings through ZMQ into each rank's scheduler in turn: a fit to `scenarios.seed000`
LinkBetween = Callable[[str, str], Link]
"""By the URLs of sender and receiver."""


def everywhere(link: Link) -> LinkBetween:
    return lambda sender, receiver: link
