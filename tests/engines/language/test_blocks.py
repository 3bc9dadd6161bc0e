from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.language.blocks import BlockAllocator, OutOfBlocks


def test_the_lowest_numbers_go_first() -> None:
    blocks = BlockAllocator(6, 16)
    assert blocks.allocate(4) == [0, 1, 2, 3]
    blocks.release([2, 1])
    assert blocks.allocate(3) == [1, 2, 4]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    blocks = BlockAllocator(2, 16)
    held = blocks.allocate(1)
    shared = blocks.share(held)
    blocks.release(held)
    assert blocks.num_free == 1
    blocks.release(shared)
    assert blocks.num_free == 2


def test_too_many_take_nothing() -> None:
    blocks = BlockAllocator(2, 16)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 of 2 free"):
        blocks.allocate(3)
    assert blocks.num_free == 2


def test_misuse_is_named() -> None:
    blocks = BlockAllocator(2, 16)
    with pytest.raises(RuntimeError, match="block 1 is free"):
        blocks.share([1])
    with pytest.raises(RuntimeError, match="block 0 was released more often"):
        blocks.release([0])
    held = blocks.allocate(1)
    with pytest.raises(RuntimeError, match=r"\{0: \(1, 2\)\}"):
        blocks.check([held, held])


def test_blocks_for_rounds_up() -> None:
    assert [BlockAllocator(1, 16).blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_repr_is_a_dashboard() -> None:
    assert repr(BlockAllocator(4, 16)) == "<BlockAllocator 4/4 free, 16 tokens each>"


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_every_block_is_free_or_held(operations: list[tuple[str, int]]) -> None:
    blocks = BlockAllocator(8, 4)
    held: list[list[int]] = []
    for operation, number in operations:
        if operation == "allocate" and number <= blocks.num_free:
            held.append(blocks.allocate(number))
        elif operation == "share" and held:
            held.append(blocks.share(held[number % len(held)]))
        elif operation == "release" and held:
            blocks.release(held.pop(number % len(held)))
        blocks.check(held)
    for holder in held:
        blocks.release(holder)
    assert blocks.num_free == 8
