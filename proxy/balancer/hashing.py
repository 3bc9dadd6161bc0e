"""Hashes that every worker and every replica of the proxy computes alike. Python's own differ by process."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_ODD = np.array([0x9E3779B97F4A7C15], np.uint64)  # 2^64 by the golden ratio: each high bit depends on all lower ones


def hash64(text: str) -> int:
    """64 bits, unsigned."""
    return int.from_bytes(blake3(text.encode()).digest(8), "little")


def hashes(text: str, count: int) -> NDArray[np.uint64]:
    """`count` independent ones of one text."""
    return np.frombuffer(blake3(text.encode()).digest(8 * count), np.uint64)


def ranks(members: NDArray[np.uint64], key: str) -> NDArray[np.uint64]:
    """The rendezvous rank of each member, given by its hash, for `key`.

    Each key orders the members in its own way, and whoever of them comes or goes leaves the order of the others.
    """
    return (members ^ hashes(key, 1)) * _ODD
