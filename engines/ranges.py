"""Byte ranges of one arena: first fit, neighbours merged. Numbers only; it holds no memory and never waits."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

ALIGNMENT = 64  # a cache line, and more than any dtype needs


def rounded(nbytes: int) -> int:
    """What a range of `nbytes` really takes."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


class Ranges:
    """`nbytes` bytes to hand out in aligned, contiguous ranges."""

    def __init__(self, nbytes: int) -> None:
        self.capacity = nbytes - nbytes % ALIGNMENT
        self._holes = [(0, self.capacity)] if self.capacity else []  # (begin, end), sorted, never touching
        self._taken: dict[int, int] = {}

    @property
    def free(self) -> int:
        return sum(end - begin for begin, end in self._holes)

    def take(self, nbytes: int) -> int | None:
        """The offset of a range of at least `nbytes`, or None when no hole is large enough."""
        size = rounded(nbytes)
        for number, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                self._holes[number : number + 1] = [(begin + size, end)] if end - begin > size else []
                self._taken[begin] = begin + size
                return begin
        return None

    def give_back(self, offset: int) -> None:
        """Raises KeyError unless `offset` is a range that was taken."""
        insort(self._holes, (offset, self._taken.pop(offset)))
        self._holes = merged(self._holes)

    def check(self) -> None:
        """Raise RuntimeError unless ranges and holes cover the arena exactly once."""
        spans = sorted([*self._holes, *self._taken.items()])
        ends = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != self.capacity:
            raise RuntimeError(f"ranges and holes do not cover {self.capacity} bytes exactly once: {spans}")

    def would_fit(self, nbytes: int, offsets: Iterable[int]) -> bool:
        """Whether `take` would succeed once the ranges at `offsets` are given back too."""
        holes = sorted([*self._holes, *((offset, self._taken[offset]) for offset in offsets)])
        return any(end - begin >= rounded(nbytes) for begin, end in merged(holes))

    def __repr__(self) -> str:
        return f"<Ranges {self.free}/{self.capacity} free in {len(self._holes)} holes>"


def merged(holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted (begin, end) holes with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for begin, end in holes:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
