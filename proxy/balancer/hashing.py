"""Hashes that every worker and every replica of the proxy computes alike. Python's own differ by process."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_ALL = (1 << 64) - 1
_FEW = 8  # so many are ranked faster one by one than by numpy
_ODD = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: each high bit depends on all lower ones


def hash64(text: str) -> int:
    """64 bits, unsigned."""
    return int.from_bytes(blake3(text.encode()).digest(8), "little")


def owner(text: str) -> int:
    """What a row of a table in shared memory says whose it is: 63 bits, never 0, which is nobody's."""
    return hash64(text) >> 1 | 1


def hashes(text: str, count: int) -> NDArray[np.uint64]:
    """`count` independent ones of one text."""
    return np.frombuffer(blake3(text.encode()).digest(8 * count), np.uint64)


def rank(member: int, key: int) -> int:
    """The rendezvous rank of a member for a key, both given by their hashes.

    Each key orders the members in its own way, and whoever of them comes or goes leaves the order of the others.
    """
    return (member ^ key) * _ODD & _ALL


def highest(members: NDArray[np.uint64], key: str) -> int:
    """The position of the member, each given by its hash, with the highest rank for `key`."""
    hashed = hash64(key)
    if len(members) > _FEW:
        return int(((members ^ np.uint64(hashed)) * np.uint64(_ODD)).argmax())
    ranks = [rank(member, hashed) for member in members.tolist()]
    return ranks.index(max(ranks))
