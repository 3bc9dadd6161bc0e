"""Media by offset, where only a head of them is at hand: what header readers look through. Knows no format."""

from __future__ import annotations

from collections.abc import Callable

More = Callable[[int, int], bytes]
"""Bytes of the media, from an offset: as many as asked, fewer where they end."""

STEPS = 512
"""Segments, boxes or chunks that a reader looks at in one chain: more is no file that anybody made."""


class Short(Exception):
    """The bytes that were wanted are not here."""


class View:
    """Bytes come out of the head where it reaches, else through `more`, if there is one."""

    __slots__ = ("_head", "_more", "nbytes")

    def __init__(self, head: bytes, nbytes: int, more: More | None) -> None:
        self._head = head
        self._more = more
        self.nbytes = nbytes

    def at(self, start: int, count: int) -> bytes:
        """Raises Short."""
        data = self.some(start, count)
        if len(data) != count:
            raise Short
        return data

    def some(self, start: int, count: int) -> bytes:
        """As many of those bytes as there are."""
        end = start + count
        if end <= len(self._head) or self._more is None or start >= self.nbytes:
            return self._head[start:end]
        return self._more(start, count)

    def big(self, start: int, count: int) -> int:
        return int.from_bytes(self.at(start, count), "big")

    def little(self, start: int, count: int) -> int:
        return int.from_bytes(self.at(start, count), "little")
