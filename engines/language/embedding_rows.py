"""What is here of one request's embeddings, in however many pieces of memory. It fetches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from engines.language.embedding_handles import Stretch

Part = tuple[int, torch.Tensor]
"""The number of its first row, and rows that follow each other, `[n, width]`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding of `shape`, `[rows, width]`. Immutable: the model thread reads one while the next is made.

    Sliced like the tensor that it stands for, as far as rows are here.
    """

    shape: tuple[int, int]
    parts: tuple[Part, ...] = ()

    def plus(self, parts: Iterable[Part]) -> Rows:
        return Rows(self.shape, (*self.parts, *parts))

    def minus(self, first: int, end: int) -> Rows:
        """Without the parts that begin at one of the rows `first` to `end - 1`."""
        return Rows(self.shape, tuple(part for part in self.parts if not first <= part[0] < end))

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        """`[stop - start, width]`, at least one row; a view where one part has them all. Raises LookupError if a row
        is not here."""
        begin, end, _ = wanted.indices(self.shape[0])
        at, found = begin, []
        for first, rows in sorted(self.parts, key=lambda part: part[0]):
            if first <= at < min(first + len(rows), end):
                found.append(rows[at - first : end - first])
                at += len(found[-1])
        if at < end:
            raise LookupError(f"row {at} is not here, and rows {begin} to {end - 1} are asked for")
        return found[0] if len(found) == 1 else torch.cat(found)


class Source(Protocol):
    """What brings rows, and ends with them."""

    def release(self) -> None: ...


class Embeddings:
    """The rows of one request by the number of the item, and what is to come. On the loop."""

    def __init__(self, count: int = 0, on_change: Callable[[], None] = lambda: None) -> None:
        """`on_change` is called when more has been computed, and at the release."""
        self.rows: list[Rows | None] = [None] * count
        self.computed = 0
        self.released = False
        self._on_change = on_change
        self._coming: dict[object, int] = {}
        self._kept: dict[Source, Stretch] = {}

    @property
    def missing(self) -> int | None:
        """The token where the first of the rows stands that are to come; None: nothing is missing."""
        return min(self._coming.values(), default=None)

    def expect(self, what: object, at: int | None) -> None:
        """The next row that `what` brings stands at that token; None: it brings no more."""
        self._coming.pop(what, None)
        if at is not None:
            self._coming[what] = at

    def keep(self, source: Source, stretch: Stretch) -> None:
        """`source` is to bring these rows, and is released when nobody needs them any more."""
        self._kept[source] = stretch
        self.expect(source, stretch.at)

    def keeps(self, source: Source) -> bool:
        return source in self._kept

    def add(self, source: Source, shape: tuple[int, int], parts: Iterable[Part]) -> None:
        """What `source` was to bring is here. `shape`: of the whole embedding."""
        parts = tuple(parts)
        self.expect(source, None)
        for number in self._kept[source].items:
            self.rows[number] = (self.rows[number] or Rows(shape)).plus(parts)

    def whole(self, number: int) -> torch.Tensor:
        """`[rows, width]`: all rows of an item. Raises LookupError if one is not here."""
        rows = self.rows[number]
        if rows is None:
            raise LookupError(f"no row of item {number} is here")
        return rows[:]

    def compute(self, count: int) -> None:
        """The first `count` tokens of the prompt have been computed: nobody needs their rows any more."""
        self.computed = count
        for stretch in [one for one in self._coming if isinstance(one, Stretch) and one.until <= count]:
            self.expect(stretch, None)
        for source, stretch in [pair for pair in self._kept.items() if pair[1].until <= count]:
            self._drop(source)
            for number in stretch.items:
                if (rows := self.rows[number]) is not None:
                    self.rows[number] = rows.minus(stretch.first, stretch.end)
        self._on_change()

    def release(self) -> None:
        """End all that is here or under way. Idempotent."""
        self.released = True
        self.rows = [None] * len(self.rows)
        for source in list(self._kept):
            self._drop(source)
        self._on_change()

    def _drop(self, source: Source) -> None:
        del self._kept[source]
        self.expect(source, None)
        source.release()
