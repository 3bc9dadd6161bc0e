from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.ranges import ALIGNMENT, Ranges


def test_ranges_are_aligned_and_merge_when_given_back() -> None:
    ranges = Ranges(4 * ALIGNMENT + 10)
    taken = [ranges.take(size) for size in (1, ALIGNMENT, ALIGNMENT + 1)]
    assert taken == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert ranges.take(1) is None
    ranges.give_back(2 * ALIGNMENT)
    ranges.give_back(0)
    assert ranges.take(4 * ALIGNMENT) is None
    ranges.give_back(ALIGNMENT)
    assert ranges.take(4 * ALIGNMENT) == 0
    assert repr(ranges) == f"<Ranges 0/{4 * ALIGNMENT} free in 0 holes>"


def test_what_was_not_taken_cannot_be_given_back() -> None:
    with pytest.raises(KeyError):
        Ranges(ALIGNMENT).give_back(0)


def test_what_leaves_may_make_room() -> None:
    ranges = Ranges(3 * ALIGNMENT)
    first, second, _ = (ranges.take(ALIGNMENT) for _ in range(3))
    assert first is not None
    assert second is not None
    assert not ranges.would_fit(2 * ALIGNMENT, [first])
    assert ranges.would_fit(2 * ALIGNMENT, [second, first])
    assert ranges.free == 0


def test_books_that_do_not_balance_are_told() -> None:
    ranges = Ranges(4 * ALIGNMENT)
    ranges.take(ALIGNMENT)
    ranges._holes[0] = (2 * ALIGNMENT, 4 * ALIGNMENT)
    with pytest.raises(RuntimeError, match="exactly once"):
        ranges.check()
    ranges._holes[0] = (0, 4 * ALIGNMENT)
    with pytest.raises(RuntimeError, match="exactly once"):
        ranges.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=50))
def test_ranges_never_overlap(operations: list[tuple[bool, int]]) -> None:
    ranges = Ranges(20 * ALIGNMENT)
    held: dict[int, int] = {}
    for take, number in operations:
        if take:
            offset = ranges.take(number)
            if offset is not None:
                held[offset] = offset + number
        elif held:
            offset = sorted(held)[number % len(held)]
            del held[offset]
            ranges.give_back(offset)
        ends = [0, *(end for _, end in sorted(held.items()))]
        assert all(end <= begin for end, begin in zip(ends, sorted(held), strict=False))
        ranges.check()
    for offset in held:
        ranges.give_back(offset)
    assert ranges.take(20 * ALIGNMENT) == 0
