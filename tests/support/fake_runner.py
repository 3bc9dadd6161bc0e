"""A language model with exact memory: the KV of a token is the token, the next token a hash of all it remembers.

Read through the block table, so that a block lost, mixed up, not copied or not restored gives another answer than
`expected`, which never saw a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engines.language.sequence import Scheduled

VOCAB = 251


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
    """Blocks of token ids, with the methods of `engines.language.kv.KVCache` that the engine uses."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory = [[-1] * block_size for _ in range(num_blocks)]

    def copy_block(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory[source])

    def save(self, blocks: Sequence[int]) -> list[list[int]]:
        return [list(self.memory[block]) for block in blocks]

    def restore(self, saved: list[list[int]], blocks: Sequence[int]) -> None:
        for block, content in zip(blocks, saved, strict=True):
            self.memory[block] = list(content)

    def read(self, table: Sequence[int], count: int) -> list[int]:
        return [self.memory[table[i // self.block_size]][i % self.block_size] for i in range(count)]

    def write(self, table: Sequence[int], position: int, token: int) -> None:
        self.memory[table[position // self.block_size]][position % self.block_size] = token


@dataclass
class FakeRunner:
    """`fails` may raise for a batch; `gate`, when cleared, holds the model thread inside a step."""

    cache: FakeCache
    layers: int = 2
    fails: Callable[[Sequence[Scheduled]], None] = lambda batch: None
    gate: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, batch: Sequence[Scheduled], on_layers: Callable[[int, int], None] | None = None) -> list[FakeSampled]:
        assert self.gate.wait(30)
        self.steps += 1
        self.fails(batch)
        sampled = []
        for entry in batch:
            for position in range(entry.start, entry.start + entry.count):
                self.cache.write(entry.seq.block_table, position, entry.seq.token_ids[position])
        if on_layers is not None:
            for layer in range(self.layers):
                on_layers(layer, layer + 1)
        for entry in batch:
            if entry.sample:
                assert entry.start + entry.count == entry.seq.num_tokens
                sampled.append(FakeSampled(next_token(self.cache.read(entry.seq.block_table, entry.seq.num_tokens))))
        return sampled
