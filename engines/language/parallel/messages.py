"""What rank 0 says to the other ranks of its engine, over two sockets to each.

    steps      blocking, model thread to model thread, one way: each is obeyed in its turn
    control    loop to loop, questions and answers: the start, signs of life, and each rank's own transfers

Numbers that come by the hundred travel as bytes: 1000 blocks take 0.1 ms less so. All ranks are processes of one
machine and one version, so bytes are in its order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engines.transfer.base import Spans
from engines.transfer.messages import Refused

Numbers = npt.NDArray[np.int64]


def packed(numbers: Iterable[int] | Numbers) -> bytes:
    array = numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64)
    return array.astype(np.int64, copy=False).tobytes()


def packed_spans(spans: Spans) -> bytes:
    return np.asarray(spans, np.int64).tobytes()


def unpacked(data: bytes) -> list[int]:
    numbers: list[int] = array_of(data).tolist()
    return numbers


def array_of(data: bytes) -> Numbers:
    """Writable, as torch asks for."""
    return np.frombuffer(data, np.int64).copy()


def unpacked_spans(data: bytes) -> list[tuple[int, int]]:
    return [(offset, length) for offset, length in array_of(data).reshape(-1, 2).tolist()]


# -- steps ------------------------------------------------------------------------------------------------------------


class Share(msgspec.Struct, frozen=True, array_like=True):
    """A sequence's share of a step: `runner.Pack.queries`."""

    blocks: bytes
    start: int
    count: int


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """Embedding rows in a step: `runner.Pack.patches`. The group spreads the rows themselves."""

    first: int
    count: int
    width: int
    dtype: str


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run a `runner.Pack`. `errands`: an `Errands` follows for each group of layers, in the midst of it."""

    token_ids: bytes
    positions: bytes
    shares: list[Share]
    patches: list[Rows]
    last_rows: list[int]
    errands: bool


class Stage(msgspec.Struct, frozen=True, tag=True):
    """`Cache.stage`."""

    first: int
    last: int
    blocks: bytes


class Write(msgspec.Struct, frozen=True, tag=True):
    """`Push.write` of the push `key`, and of what was staged just before if it is `staged`."""

    key: int
    source: bytes
    target: bytes
    staged: bool
    last: bool


class Errands(msgspec.Struct, frozen=True, tag=True):
    """What the handoffs do once a group of layers is computed."""

    errands: list[Stage | Write]


class Load(msgspec.Struct, frozen=True, tag=True):
    blocks: bytes


class CopyBlock(msgspec.Struct, frozen=True, tag=True):
    source: int
    target: int


class Save(msgspec.Struct, frozen=True, tag=True):
    """Keep what these blocks hold under `number`, until it is forgotten."""

    number: int
    blocks: bytes


class Restore(msgspec.Struct, frozen=True, tag=True):
    number: int
    blocks: bytes


class Forget(msgspec.Struct, frozen=True, tag=True):
    numbers: list[int]


Command = Step | Errands | Load | CopyBlock | Save | Restore | Forget

# -- control ----------------------------------------------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first question: load the weights of this rank. `settings` are those of rank 0, as JSON."""

    rank: int
    settings: bytes


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Meet the other ranks at this file, and be ready for steps and transfers."""

    meeting: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    pass


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Answered with the ticket's offer. Every `key` is free when `Freed` says so."""

    key: int
    spans: bytes
    timeout: float


class Fetch(msgspec.Struct, frozen=True, tag=True):
    key: int
    where: dict[str, Any]


class Wait(msgspec.Struct, frozen=True, tag=True):
    key: int


class Open(msgspec.Struct, frozen=True, tag=True):
    key: int
    offer: dict[str, Any]
    timeout: float


class Finish(msgspec.Struct, frozen=True, tag=True):
    key: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    key: int
    reason: str


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Answered with where it can be fetched, once."""

    key: int
    name: str
    spans: bytes
    ttl: float | None


class Release(msgspec.Struct, frozen=True, tag=True):
    """The end of a ticket, a push or a publication, however far it came. Not answered."""

    key: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for the answer to this question any more. Not answered."""

    id: int


Question = Begin | Connect | Ping | Reserve | Fetch | Wait | Open | Finish | Abort | Publish | Release | Cancel


class Asked(msgspec.Struct, frozen=True):
    id: int
    body: Question


class Answered(msgspec.Struct, frozen=True, tag=True):
    """`refused` where it did not work; `fatal` where a rank cannot be, with the reason."""

    id: int
    value: dict[str, Any] | None = None
    refused: Refused | None = None
    fatal: str | None = None


class Freed(msgspec.Struct, frozen=True, tag=True):
    key: int


Said = Answered | Freed
