from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engines.language.parallel.messages import (
    Command,
    Errands,
    Rows,
    Share,
    Stage,
    Step,
    Write,
    packed,
    packed_spans,
    unpacked,
    unpacked_spans,
)


@pytest.mark.parametrize("numbers", [[], [3], [0, 1 << 40, 7]])
def test_numbers_travel_as_bytes(numbers: list[int]) -> None:
    assert unpacked(packed(numbers)) == numbers
    assert unpacked(packed(np.array(numbers, np.int64))) == numbers


def test_numbers_of_another_width_are_widened() -> None:
    assert unpacked(packed(np.array([3, -1], np.int32))) == [3, -1]


@pytest.mark.parametrize("spans", [[], [(0, 16), (1 << 40, 3)]])
def test_spans_travel_as_bytes(spans: list[tuple[int, int]]) -> None:
    assert unpacked_spans(packed_spans(spans)) == spans


@pytest.mark.parametrize(
    "command",
    [
        Step(b"ids", b"positions", [Share(b"blocks", 3, 2)], [Rows(1, 2, 64, "float32")], [4], errands=True),
        Errands([Stage(0, 2, b"blocks"), Write(7, b"source", b"target", staged=True, last=True)]),
        Errands([]),
    ],
    ids=["step", "errands", "no errands"],
)
def test_a_command_is_told_from_the_others(command: Command) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command) == command
