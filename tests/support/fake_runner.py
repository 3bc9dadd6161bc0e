"""A language model with exact memory: the KV of a token is the token, the next token a hash of all it remembers.

Read through the block table, so that a block lost, mixed up, not copied or not restored gives another answer than
`expected`, which never saw a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engines.language.kv import KVCache, KVLayout
from engines.language.sequence import Scheduled

VOCAB = 251
LAYERS = 2


@dataclass(frozen=True)
class FakeSampled:
    token_id: int
    logprob: float = -1.0
    top_logprobs: tuple[tuple[int, float], ...] = ()


def next_token(tokens: Sequence[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeCache:
    """Token ids where the real cache has keys and values, in its very layout: every layer and half must agree."""

    def __init__(self, num_blocks: int, block_size: int, buffer: memoryview | None = None, apart: bool = False) -> None:
        self.layout = layout(num_blocks, block_size)
        self._pool = KVCache(self.layout, buffer, apart=apart)
        self._memory = self._pool.pool.numpy()[..., 0, 0]
        self._memory[:] = -1
        self.copy_block = self._pool.copy_block
        self.restore = self._pool.restore
        self.stage = self._pool.stage
        self.load = self._pool.load

    def save(self, blocks: Sequence[int]) -> Any:
        return self._pool.save(blocks)

    def read(self, table: Sequence[int], count: int) -> list[int]:
        """The tokens; -1 where layers or halves disagree."""
        seen = self._memory[:, list(table)].transpose(0, 2, 1, 3).reshape(2 * LAYERS, -1)[:, :count]
        return [int(token) for token in np.where((seen == seen[0]).all(axis=0), seen[0], -1)]

    def write(self, table: Sequence[int], position: int, token: int, layers: slice = slice(None)) -> None:
        block, offset = table[position // self.layout.block_size], position % self.layout.block_size
        self._memory[layers, block, :, offset] = token


def layout(num_blocks: int, block_size: int) -> KVLayout:
    return KVLayout(LAYERS, num_blocks, block_size, 1, 1, torch.int64)


@dataclass
class FakeRunner:
    """`fails` may raise for a batch, `head` too, once its KV is there; `gate`, when cleared, holds the model thread
    inside a step."""

    cache: FakeCache
    fails: Callable[[Sequence[Scheduled]], None] = lambda batch: None
    head: Callable[[Sequence[Scheduled]], None] = lambda batch: None
    gate: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, batch: Sequence[Scheduled], on_layers: Callable[[int, int], None] | None = None) -> list[FakeSampled]:
        assert self.gate.wait(30)
        self.steps += 1
        self.fails(batch)
        sampled = []
        for layer in range(LAYERS):
            for entry in batch:
                for position in range(entry.start, entry.start + entry.count):
                    token = entry.seq.token_ids[position]
                    self.cache.write(entry.seq.block_table, position, token, slice(layer, layer + 1))
            if on_layers is not None:
                on_layers(layer, layer + 1)
        self.head(batch)
        for entry in batch:
            if entry.sample:
                assert entry.start + entry.count == entry.seq.num_tokens
                sampled.append(FakeSampled(next_token(self.cache.read(entry.seq.block_table, entry.seq.num_tokens))))
        return sampled
