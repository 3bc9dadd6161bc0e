"""What a request says of its embeddings, and in which stretches they are wanted. Pure; no memory and no transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engines.errors import BadRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Expected(Protocol):
    """An item of a prompt, as far as its embedding goes."""

    @property
    def mm_hash(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def row(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Handle:
    """What an encoder told of one item, checked against what this model needs."""

    mm_hash: str
    dtype: torch.dtype
    shape: tuple[int, int]
    where: Mapping[str, Any]

    @property
    def row_nbytes(self) -> int:
        return self.shape[1] * self.dtype.itemsize

    @classmethod
    def read(cls, item: Expected, entries: Mapping[str, Any], width: int) -> Handle:
        """Raises BadRequest when the entry is missing, misshapen or of another model."""
        param = f"ec_transfer_params.{item.mm_hash}"
        entry = entries.get(item.mm_hash)
        if not isinstance(entry, Mapping):
            raise BadRequest(
                f"there is no embedding of item {item.mm_hash}: this engine has no encoder", param=param, stage="encode"
            )
        shape, where = entry.get("shape"), entry.get("where")
        if shape != [item.num_rows, width]:
            message = f"the embedding of {item.mm_hash} has shape {shape}, this model needs {[item.num_rows, width]}"
            raise BadRequest(message, param=f"{param}.shape", stage="encode", code="embedding_mismatch")
        dtype = DTYPES.get(str(entry.get("dtype")))
        if dtype is None or not isinstance(where, Mapping):
            raise BadRequest(f"dtype must be one of {', '.join(DTYPES)} and where an object", param=param)
        return cls(item.mm_hash, dtype, (item.num_rows, width), where)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `first` to `end - 1` of the embedding `mm_hash`, which `items` of the prompt, by number, need.

    at: the token where the first of them stands. until: the one behind the last, wherever they stand. more: others of
    the same embedding are wanted later.
    """

    mm_hash: str
    items: tuple[int, ...]
    first: int
    end: int
    at: int
    until: int
    more: bool

    def next(self, first: int, computed: int) -> int:
        """The first row from `first` on that is still needed when so many tokens of the prompt have been computed."""
        if self.until - self.at != self.end - self.first:
            return first  # it stands in several places
        return min(max(first, self.first + computed - self.at), self.end)

    def cut(self, first: int, end: int) -> Stretch:
        """Its rows `first` to `end - 1`: all, or some where each stands in one place."""
        at, until = self.at + first - self.first, self.until - (self.end - end)
        return Stretch(self.mm_hash, self.items, first, end, at, until, self.more or end < self.end)


def whole(items: Sequence[Expected]) -> list[Stretch]:
    """One stretch for each embedding, however often the prompt shows it."""
    found: list[Stretch] = []
    for mm_hash in dict.fromkeys(item.mm_hash for item in items):
        places = tuple(number for number, item in enumerate(items) if item.mm_hash == mm_hash)
        first, last = items[places[0]], items[places[-1]]
        found.append(
            Stretch(mm_hash, places, 0, first.num_rows, first.offset, last.offset + last.num_tokens, more=False)
        )
    return found


def in_order(items: Sequence[Expected]) -> list[Stretch]:
    """One stretch for each item, in the order of the prompt: an image that is shown twice is wanted twice."""
    found: list[Stretch] = []
    for number, item in enumerate(items):
        more = any(other.mm_hash == item.mm_hash for other in items[number + 1 :])
        end, until = item.row + item.num_tokens, item.offset + item.num_tokens
        found.append(Stretch(item.mm_hash, (number,), item.row, end, item.offset, until, more))
    return found
