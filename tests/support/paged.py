"""Paged attention beside attention written out over plain keys and values."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from engines.language.attention import Backend, Query, paged_attention
from engines.language.gathering import Gathering
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

    def __init__(
        self, spans: list[tuple[int, int]], block_size: int = 4, backend: Callable[[KVCache], Backend] = Gathering
    ) -> None:
        torch.manual_seed(0)
        self.cache = new_cache(block_size)
        self.backend = backend(self.cache)
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
        step = self.backend.plan(self.queries, told.append)
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
    "everything": [(90, 1), (8, 1), (17, 5), (4, 8), (0, 9), (0, 3)],
}
