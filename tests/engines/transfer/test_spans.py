"""Span arithmetic against the obvious byte-by-byte meaning."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.transfer.base import LayoutMismatch
from engines.transfer.spans import Region, as_list, pack, pair, part, table, total, unpack

SIZE = 64
SPANS = st.lists(
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).filter(lambda s: s[0] + s[1] <= SIZE), max_size=8
)


def logical(spans):
    return [byte for offset, length in spans for byte in range(offset, offset + length)]


@given(SPANS)
def test_merging_keeps_every_byte_in_order(spans):
    merged = as_list(table(spans, SIZE))
    assert logical(merged) == logical(spans)
    assert all(length > 0 for _, length in merged)
    assert all(a + n != b for (a, n), (b, _) in pairwise(merged))


@given(SPANS)
def test_packed_spans_are_read_like_a_list_of_them(spans):
    packed = pack(np.array(spans, dtype=np.int64).reshape(-1, 2))
    assert unpack(packed, SIZE).tolist() == table(spans, SIZE).tolist()


@given(SPANS, st.integers(0, 8 * SIZE), st.integers(0, 8 * SIZE))
def test_a_part_is_the_logical_bytes_asked_for(spans, start, length):
    whole = table(spans, SIZE)
    if start + length > total(whole):
        with pytest.raises(LayoutMismatch, match=f"it has {total(whole)}"):
            part(whole, start, length)
    else:
        assert logical(as_list(part(whole, start, length))) == logical(spans)[start : start + length]


@given(SPANS, SPANS)
def test_moves_map_each_logical_byte_and_are_the_fewest(left, right):
    size = min(len(logical(left)), len(logical(right)))
    source, target = _cut(left, size), _cut(right, size)
    moves = pair(table(source, SIZE), table(target, SIZE)).tolist()
    copied = [(s + i, t + i) for s, t, n in moves for i in range(n)]
    assert copied == list(zip(logical(source), logical(target), strict=True))
    jumps = sum(b[0] != a[0] + 1 or b[1] != a[1] + 1 for a, b in pairwise(copied))
    assert len(moves) == (jumps + 1 if copied else 0)


def _cut(spans, size):
    out = []
    for offset, length in spans:
        take = min(length, size)
        out.append((offset, take))
        size -= take
    return out


@given(SPANS, SPANS)
def test_a_region_holds_exactly_its_bytes(granted, asked):
    region = Region(table(granted, SIZE))
    # merged: a span that crosses from one granted span into the next is held
    assert region.holds(table(asked, SIZE)) == (set(logical(asked)) <= set(logical(granted)))


@pytest.mark.parametrize("spans", [[(-1, 2)], [(0, -1)], [(60, 5)], [(65, 0)], [(2**63 - 1, 1)], [(1, 2**63 - 1)]])
def test_spans_outside_the_arena_are_refused(spans):
    with pytest.raises(LayoutMismatch, match="outside"):
        table(spans, SIZE)
    with pytest.raises(LayoutMismatch, match="outside"):
        unpack(pack(np.array(spans)), SIZE)


@pytest.mark.parametrize("spans", [[(1, 2**70)], [(1,)]])
def test_what_is_no_span_is_refused(spans):
    with pytest.raises(LayoutMismatch):
        table(spans, SIZE)


def test_bytes_that_are_no_spans_are_refused():
    with pytest.raises(LayoutMismatch, match="17 bytes"):
        unpack(bytes(17), SIZE)


def test_unequal_totals_are_refused():
    with pytest.raises(LayoutMismatch, match="3 source bytes do not fill 4"):
        pair(table([(0, 3)], SIZE), table([(0, 4)], SIZE))


def test_large_tables_stay_cheap_and_exact():
    offsets = np.random.default_rng(0).permutation(4096)[:1000] * 16384
    spans = table([(int(o), 16384) for o in offsets], 4096 * 16384)
    assert total(spans) == 1000 * 16384
    moves = pair(spans, table([(0, 1000 * 16384)], 1000 * 16384))
    assert moves[:, 2].sum() == 1000 * 16384
