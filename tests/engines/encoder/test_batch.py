"""Batches by patch budget: order, fullness, and that nothing is lost."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.encoder.batch import Batcher


class Item:
    def __init__(self, patches: int) -> None:
        self.patches = patches


def filled(budget: int, sizes: list[int]) -> tuple[Batcher[Item], list[Item]]:
    batcher: Batcher[Item] = Batcher(budget)
    items = [Item(size) for size in sizes]
    for item in items:
        batcher.add(item, item.patches)
    return batcher, items


def drain(batcher: Batcher[Item]) -> list[list[Item]]:
    batches = []
    while batch := batcher.take():
        batches.append(batch)
    return batches


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([], []),
        ([10], [[10]]),
        ([4, 4, 4], [[4, 4], [4]]),
        ([4, 100, 4], [[4], [100], [4]]),
        ([100, 4], [[100], [4]]),
        ([5, 6, 1], [[5], [6, 1]]),
    ],
)
def test_a_batch_is_the_longest_prefix_that_fits(sizes: list[int], batches: list[list[int]]) -> None:
    batcher, _ = filled(10, sizes)
    assert [[item.patches for item in batch] for batch in drain(batcher)] == batches
    assert repr(batcher) == "<Batcher 0 waiting, 0 patches, budget 10>"


@pytest.mark.parametrize(
    ("sizes", "shares", "first"),
    [([4, 4], 2, 1), ([2, 2, 2, 2], 2, 2), ([2, 2, 2], 2, 1), ([9, 1], 2, 1), ([2], 3, 1), ([8, 8, 8, 8], 2, 1)],
)
def test_a_share_is_no_more_than_its_part_and_never_nothing(sizes: list[int], shares: int, first: int) -> None:
    batcher, items = filled(10, sizes)
    assert batcher.take(shares) == items[:first]


@given(st.integers(1, 50), st.lists(st.integers(1, 80), max_size=30))
def test_order_is_kept_and_only_a_lone_item_exceeds_the_budget(budget: int, sizes: list[int]) -> None:
    batcher, items = filled(budget, sizes)
    assert batcher.patches == sum(sizes)
    batches = drain(batcher)
    assert [item for batch in batches for item in batch] == items
    for batch, following in zip_longest(batches, batches[1:]):
        used = sum(item.patches for item in batch)
        assert used <= budget or len(batch) == 1
        assert following is None or used + following[0].patches > budget, "the next one would have fitted"


def test_a_discarded_item_is_not_run() -> None:
    batcher, items = filled(10, [4, 4, 4])
    assert batcher.discard(items[0])
    assert not batcher.discard(items[0])
    assert batcher.patches == 8
    assert batcher.take() == items[1:]
    assert not batcher.discard(items[1]), "taken items are the caller's"


def test_what_makes_no_sense_is_refused() -> None:
    batcher, items = filled(10, [4])
    with pytest.raises(ValueError, match="waits already"):
        batcher.add(items[0], 4)
    with pytest.raises(ValueError, match="at least one patch"):
        batcher.add(Item(0), 0)
    with pytest.raises(ValueError, match="budget"):
        Batcher(0)
