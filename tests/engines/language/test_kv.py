"""The bytes that spans name are the bytes that blocks hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.language.kv import KVCache, KVLayout, coalesce
from engines.transfer.base import LayoutMismatch

LAYOUT = KVLayout(num_layers=3, num_blocks=10, block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
block_ids = st.lists(st.integers(0, 9), unique=True, max_size=10)


def numbered(layout: KVLayout = LAYOUT) -> KVCache:
    cache = KVCache(layout, memoryview(bytearray(layout.nbytes)))
    cache.pool.copy_(torch.arange(cache.pool.numel()).view_as(cache.pool))
    return cache


def bytes_at(cache: KVCache, spans: list[tuple[int, int]]) -> bytes:
    memory = cache.pool.view(-1).numpy().tobytes()
    return b"".join(memory[offset : offset + length] for offset, length in spans)


def test_the_region_is_as_large_as_its_blocks():
    assert LAYOUT.block_nbytes == 2 * 4 * 2 * 8 * 4
    assert LAYOUT.nbytes == 3 * 10 * LAYOUT.block_nbytes
    assert KVCache(LAYOUT, memoryview(bytearray(LAYOUT.nbytes))).pool.nbytes == LAYOUT.nbytes


@given(block_ids, st.integers(0, 3), st.integers(0, 3))
def test_spans_are_the_blocks_in_order(blocks, first, last):
    cache = numbered()
    layers = range(first, last)
    wanted = b"".join(cache.pool[layer, block].numpy().tobytes() for layer in layers for block in blocks)
    assert bytes_at(cache, LAYOUT.spans(layers, blocks)) == wanted


@given(block_ids)
def test_no_span_begins_where_the_one_before_it_ends(blocks):
    spans = LAYOUT.spans(range(3), blocks)
    assert all(a + length != b for (a, length), (b, _) in pairwise(spans))


def test_neighbours_are_merged_within_a_layer_and_a_whole_cache_is_one_span():
    size = LAYOUT.block_nbytes
    assert LAYOUT.spans(range(1, 2), [2, 3, 4, 7]) == [(12 * size, 3 * size), (17 * size, size)]
    assert LAYOUT.spans(range(3), range(10)) == [(0, LAYOUT.nbytes)]
    assert LAYOUT.spans(range(3), []) == LAYOUT.spans([], [1]) == []


def test_descending_blocks_are_not_merged():
    size = LAYOUT.block_nbytes
    assert coalesce([(size, size), (0, size)]) == [(size, size), (0, size)]


@pytest.mark.parametrize(("layers", "blocks"), [([3], [0]), ([-1], [0]), ([0], [10]), ([0], [-1])])
def test_what_lies_outside_has_no_spans(layers, blocks):
    with pytest.raises(IndexError, match="outside a cache"):
        LAYOUT.spans(layers, blocks)


def test_facts_agree_whatever_the_number_of_blocks():
    other = KVLayout(3, 99, 4, 2, 8, torch.float32)
    LAYOUT.check(other.facts())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block_size": 8}, "block_size is 8 there and 4 here"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' there and 'float32' here"),
        ({"num_layers": None}, "num_layers is None there and 3 here"),
    ],
)
def test_a_peer_with_other_blocks_is_refused_by_name(change, told):
    with pytest.raises(LayoutMismatch, match=told):
        LAYOUT.check({**LAYOUT.facts(), **change})


def test_a_cache_lives_on_the_arena_it_is_given():
    arena = memoryview(bytearray(LAYOUT.nbytes + 100))
    cache = KVCache(LAYOUT, arena)
    cache.pool[2, 9, 1] = 1.0
    ((offset, length),) = LAYOUT.spans([2], [9])
    assert torch.frombuffer(arena[offset : offset + length], dtype=torch.float32).sum() == length / 8
    assert not any(arena[:offset])


def test_an_arena_too_small_is_refused():
    with pytest.raises(ValueError, match=f"needs {LAYOUT.nbytes}"):
        KVCache(LAYOUT, memoryview(bytearray(LAYOUT.nbytes - 1)))


def test_rows_and_layers_show_the_same_memory():
    cache = numbered()
    row = cache.key_row(5, 3)
    assert torch.equal(cache.rows[1][row], cache.pool[1, 5, 0, 3])
    assert torch.equal(cache.rows[1][row + LAYOUT.block_size], cache.pool[1, 5, 1, 3])
    assert torch.equal(cache.layers[1][2 * 5 + 1], cache.pool[1, 5, 1])


def test_copying_a_block_copies_every_layer_and_nothing_else():
    cache, before = numbered(), numbered()
    cache.copy_block(4, 7)
    assert torch.equal(cache.pool[:, 7], before.pool[:, 4])
    others = [block for block in range(10) if block != 7]
    assert torch.equal(cache.pool[:, others], before.pool[:, others])


def test_what_is_saved_can_be_restored_elsewhere():
    cache, before = numbered(), numbered()
    saved = cache.save([8, 2])
    cache.pool.zero_()
    cache.restore(saved, [0, 5])
    assert torch.equal(cache.pool[:, [0, 5]], before.pool[:, [8, 2]])
    with pytest.raises(ValueError, match="2 blocks were saved, 1 are given"):
        cache.restore(saved, [0])


def test_repr_tells_the_size():
    assert repr(KVCache(LAYOUT)) == f"<KVCache 3 layers × 10 blocks, {LAYOUT.nbytes} bytes>"


def test_memory_of_its_own_has_a_block_that_no_sequence_holds():
    cache = KVCache(LAYOUT)
    assert cache.scratch_block == 10
    cache.rows[2][cache.key_row(10, 3)] = 1.0
    assert not cache.pool[:, :10].any()
    assert KVCache(LAYOUT, memoryview(bytearray(LAYOUT.nbytes))).scratch_block is None


def test_a_cache_on_its_arena_has_nothing_to_copy():
    cache = KVCache(LAYOUT, memoryview(bytearray(LAYOUT.nbytes)))
    assert cache.stage(range(3), [1]) is None
    cache.load([1])


def test_a_cache_apart_is_copied_block_by_block():
    arena = memoryview(bytearray(LAYOUT.nbytes))
    here, there = KVCache(LAYOUT, arena, apart=True), KVCache(LAYOUT, arena)
    here.pool.copy_(torch.arange(here.pool.numel()).view(here.pool.shape))
    assert not there.pool.any()
    ready = here.stage(range(1, 3), [4, 5, 2])
    assert ready is not None
    ready()
    seen = there.pool.flatten(2).any(2).nonzero().tolist()
    assert seen == [[layer, block] for layer in (1, 2) for block in (2, 4, 5)]
    assert torch.equal(there.pool[1:, [2, 4, 5]], here.pool[1:, [2, 4, 5]])
    there.pool[:, 7] = 5.0
    here.load([7])
    assert (here.pool[:, 7] == 5.0).all()
    assert (here.pool == 5.0).sum() == there.pool[:, 7].numel() + 1  # one of the numbers above is a 5 too
