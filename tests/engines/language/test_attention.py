"""Paged attention against attention written out over plain keys and values."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.language import attention
from engines.language.attention import Query, Scratch, groups, paged_attention, plan
from engines.language.kv import KVCache, KVLayout

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


class Layer(torch.nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def new_cache(block_size: int = 4, num_blocks: int = 400) -> KVCache:
    return KVCache(KVLayout(3, num_blocks, block_size, KV_HEADS, HEAD_DIM, torch.float32))


def plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last `len(query)` tokens; all `[tokens, heads, head_dim]`."""
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * HEAD_DIM**-0.5
    later = torch.arange(len(keys)) > torch.arange(len(keys) - len(query), len(keys))[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), values)


class Bench:
    """Sequences with known keys and values; what came before a query's start is put into the cache beforehand."""

    def __init__(self, spans: list[tuple[int, int]], block_size: int = 4) -> None:
        torch.manual_seed(0)
        self.cache = new_cache(block_size)
        self.cache.pool.copy_(torch.randn_like(self.cache.pool))  # what earlier sequences left
        free = random.Random(0).sample(range(400), 400)
        self.tokens = [torch.randn(3, start + count, HEADS, HEAD_DIM) for start, count in spans]
        self.queries = []
        for (start, count), held in zip(spans, self.tokens, strict=True):
            table = [free.pop() for _ in range(-(-(start + count) // block_size))]
            self.queries.append(Query(table, start, count))
            for token in range(start):
                self.cache.pool[:, table[token // block_size], 0, token % block_size] = held[1, token, :KV_HEADS]
                self.cache.pool[:, table[token // block_size], 1, token % block_size] = held[2, token, :KV_HEADS]

    def run(self, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.cat([held[:, q.start :] for held, q in zip(self.tokens, self.queries, strict=True)], 1)
        query, key, value = (part.transpose(0, 1)[None] for part in new)
        told: list[int] = []
        step = plan(self.cache, Scratch(self.cache), self.queries, told.append)
        out, weights = paged_attention(
            Layer(layer), query, key[:, :KV_HEADS], value[:, :KV_HEADS], None, HEAD_DIM**-0.5, step, dropout=0.0
        )
        assert told == [layer]
        assert weights is None
        expected = [
            plain(held[0, q.start :], held[1, :, :KV_HEADS], held[2, :, :KV_HEADS])
            for held, q in zip(self.tokens, self.queries, strict=True)
        ]
        return out[0], torch.cat(expected)


MIXES = {
    "one decode": [(9, 1)],
    "first token": [(0, 1)],
    "equal decodes": [(12, 1)] * 3,
    "unequal decodes": [(200, 1), (70, 1), (13, 1), (3, 1), (0, 1)],
    "whole prompt": [(0, 11)],
    "prompts": [(0, 11), (0, 4), (0, 2)],
    "chunk": [(5, 6)],
    "everything": [(90, 1), (8, 1), (0, 9), (17, 5), (0, 3), (4, 8)],
}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("spans", MIXES.values(), ids=MIXES)
def test_it_equals_plain_attention(spans, block_size):
    found, expected = Bench(spans, block_size).run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", MIXES.values(), ids=MIXES)
def test_in_the_last_layer_the_last_row_of_each_sequence_counts(spans):
    found, expected = Bench(spans).run(layer=2)
    last = torch.tensor([count for _, count in spans]).cumsum(0) - 1
    torch.testing.assert_close(found[last], expected[last], rtol=1e-5, atol=1e-5)
    others = [row for row in range(len(found)) if row not in last]
    assert not found[others].any()


def test_small_gathers_give_the_same(monkeypatch):
    monkeypatch.setitem(attention.GATHER_NBYTES, "cpu", 1)
    found, expected = Bench(MIXES["unequal decodes"]).run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_table_too_short_is_told_before_anything_is_written():
    cache = new_cache()
    with pytest.raises(IndexError, match="2 blocks of 4 cannot hold 9 tokens"):
        plan(cache, Scratch(cache), [Query([3, 4], 0, 9)], lambda layer: None)


counts = st.lists(st.integers(1, 500), max_size=40).map(lambda found: sorted(found, reverse=True))


@given(counts, st.integers(1, 2000))
def test_groups_cover_all_and_waste_little(counts, limit):
    cuts = list(groups(counts, limit))
    assert [index for a, b in cuts for index in range(a, b)] == list(range(len(counts)))
    for first, last in cuts:
        padded = (last - first) * counts[first]
        assert last - first == 1 or padded <= limit
        assert padded <= max(2 * sum(counts[first:last]), attention.SMALL_GROUP_BLOCKS * (last - first))
