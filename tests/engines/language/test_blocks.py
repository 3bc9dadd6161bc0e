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


def test_a_named_block_is_found_until_it_is_overwritten() -> None:
    blocks = BlockAllocator(4, 16)
    held = blocks.allocate(2)
    for block, name in zip(held, (b"a", b"b"), strict=True):
        blocks.name(block, name)
    assert blocks.find([b"a", b"b", b"c"]) == held
    blocks.release(held)
    assert blocks.num_free == 4 and blocks.num_idle(held) == 2
    again = blocks.share(blocks.find([b"a"]))
    assert again == held[:1] and blocks.num_free == 3
    assert blocks.allocate(3) == [1, 2, 3], "those without a name first, and then the one that nobody holds"
    assert blocks.find([b"a", b"b"]) == again
    blocks.release(again)
    assert blocks.allocate(1) == again
    assert blocks.find([b"a"]) == []


def test_of_a_chain_the_end_is_overwritten_first() -> None:
    blocks = BlockAllocator(3, 16)
    held = blocks.allocate(3)
    for block, name in zip(held, (b"a", b"b", b"c"), strict=True):
        blocks.name(block, name)
    blocks.release(held)
    blocks.allocate(1)
    assert blocks.find([b"a", b"b", b"c"]) == held[:2]


def test_a_name_belongs_to_one_block_and_a_block_has_one_name() -> None:
    blocks = BlockAllocator(2, 16)
    first, second = blocks.allocate(2)
    blocks.name(first, b"a")
    blocks.name(second, b"a")
    blocks.name(first, b"b")
    assert blocks.find([b"a"]) == [first] and blocks.find([b"b"]) == []
    blocks.release([second])
    assert blocks.num_idle([second]) == 0
    blocks.check([[first]])


@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release", "name", "find"]), st.integers(0, 9)), max_size=60
    )
)
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
        elif operation == "name" and held and held[-1]:
            blocks.name(held[-1][number % len(held[-1])], bytes([number]))
        elif operation == "find":
            held.append(blocks.share(blocks.find([bytes([number])])))
        blocks.check(held)
    for holder in held:
        blocks.release(holder)
    assert blocks.num_free == 8
