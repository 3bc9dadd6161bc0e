"""Span arithmetic: check, merge, contain, and pair two span lists into moves. Knows no memory.

    source  |--a--|    |----b----|            logical bytes  |--a--|----b----|
    target  |----c----|      |--d--|          logical bytes  |----c----|--d--|
    moves   a→c  b₁→c  b₂→d                   cut wherever either side jumps

numpy, not a Python loop: 1000 blocks pair in 0.2 ms instead of 0.9 ms, beside 2.5 ms for copying 1000 × 16 KiB.
"""

from __future__ import annotations

from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engines.transfer.base import LayoutMismatch, Spans

Table: TypeAlias = npt.NDArray[np.int64]
"""int64 [n, 2]: offset, length; every length > 0, neighbours merged where they touch."""
Moves: TypeAlias = npt.NDArray[np.int64]
"""int64 [n, 3]: source offset, target offset, length; neighbours merged where both sides touch."""


def table(spans: Spans, limit: int, what: str = "arena") -> Table:
    """Check and merge. Raises LayoutMismatch for a negative number or a byte at or beyond `limit`."""
    try:
        flat = np.fromiter(chain.from_iterable(spans), dtype=np.int64, count=2 * len(spans))
    except (ValueError, OverflowError) as error:
        raise LayoutMismatch(f"spans must be (offset, length) pairs of 64-bit integers: {error}") from None
    return _checked(flat.reshape(-1, 2), limit, what)


def pack(spans: Table) -> bytes:
    """For a message: 16 bytes each, where 1000 tuples take 0.7 ms to be sent and read."""
    return spans.astype("<i8").tobytes()


def unpack(data: bytes, limit: int) -> Table:
    """What `pack` made, or anything else: checked and merged like a `table`."""
    if len(data) % 16:
        raise LayoutMismatch(f"{len(data)} bytes are not (offset, length) pairs of 64-bit integers")
    return _checked(np.frombuffer(data, dtype="<i8").reshape(-1, 2), limit, "arena")


def _checked(pairs: Table, limit: int, what: str) -> Table:
    if not len(pairs):
        return pairs
    offsets, lengths = pairs[:, 0], pairs[:, 1]
    shortest = lengths.min()
    # offset > limit - length, not offset + length > limit: the sum of two hostile numbers wraps around
    if offsets.min() < 0 or shortest < 0 or bool((offsets > limit - lengths).any()):
        raise LayoutMismatch(f"a span lies outside the {what} of {limit} bytes")
    return _merged(pairs if shortest else pairs[lengths > 0])


def _merged(pairs: Table) -> Table:
    apart = pairs[1:, 0] != pairs[:-1, 0] + pairs[:-1, 1]
    if apart.all():
        return pairs
    starts = np.flatnonzero(np.r_[True, apart])
    return np.stack((pairs[starts, 0], np.add.reduceat(pairs[:, 1], starts)), axis=1)


def total(spans: Table) -> int:
    return int(spans[:, 1].sum())


def part(spans: Table, start: int, length: int) -> Table:
    """The spans of logical bytes `start` to `start + length`. Raises LayoutMismatch if there are not so many."""
    if start + length > total(spans):
        raise LayoutMismatch(f"there are no {length} bytes from byte {start} on: it has {total(spans)}")
    ends = np.cumsum(spans[:, 1])
    first = np.maximum(ends - spans[:, 1], start)
    left = np.minimum(ends, start + length) - first
    cut: Table = np.stack((spans[:, 0] + first - (ends - spans[:, 1]), left), axis=1)[left > 0]
    return cut


def as_list(spans: Table) -> list[tuple[int, int]]:
    return [(offset, length) for offset, length in spans.tolist()]


def pair(source: Table, target: Table) -> Moves:
    """The fewest moves that copy `source` to `target`. Raises LayoutMismatch if the totals differ."""
    if total(source) != total(target):
        raise LayoutMismatch(f"{total(source)} source bytes do not fill {total(target)} target bytes")
    if len(source) == len(target) and bool((source[:, 1] == target[:, 1]).all()):
        return np.column_stack((source[:, 0], target))  # block to block, the usual case: 5 µs instead of 200
    source_ends, target_ends = np.cumsum(source[:, 1]), np.cumsum(target[:, 1])
    ends = np.union1d(source_ends, target_ends)
    starts = np.r_[0, ends[:-1]]
    return np.stack((_locate(source, source_ends, starts), _locate(target, target_ends, starts), ends - starts), axis=1)


def _locate(spans: Table, ends: npt.NDArray[np.int64], logical: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Arena offsets of logical positions."""
    index = np.searchsorted(ends, logical, side="right")
    found: npt.NDArray[np.int64] = spans[index, 0] + logical - (ends[index] - spans[index, 1])
    return found


class Region:
    """A set of bytes that can be asked whether it holds spans; order and overlap do not matter."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, spans: Table) -> None:
        ordered = spans[np.argsort(spans[:, 0], kind="stable")]
        ends = np.maximum.accumulate(ordered[:, 0] + ordered[:, 1]) if len(ordered) else np.empty(0, dtype=np.int64)
        first = np.flatnonzero(np.r_[True, ordered[1:, 0] > ends[:-1]]) if len(ordered) else np.empty(0, dtype=np.int64)
        self._starts = ordered[first, 0]
        self._ends = ends[np.r_[first[1:] - 1, len(ordered) - 1]] if len(ordered) else ends

    def holds(self, spans: Table) -> bool:
        if not len(spans):
            return True
        index = np.searchsorted(self._starts, spans[:, 0], side="right") - 1
        return bool((index >= 0).all() and (spans[:, 0] + spans[:, 1] <= self._ends[index]).all())
