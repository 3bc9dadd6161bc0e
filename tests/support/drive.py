"""A language engine without a service: the smallest loop over `Runner` that schedules, runs and appends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from engines.language.kv import KVCache, KVLayout
from engines.language.model import LanguageModel
from engines.language.runner import Runner
from engines.language.sequence import Item, SamplingParams, Scheduled, Sequence
from tests.support.checkpoints import checkpoint
from tests.support.pictures import image_file
from tests.support.reference import reference

BLOCK_SIZE = 16

SMALL, WIDE = (96, 64), (180, 112)
CASES: dict[str, tuple[list[Any], list[tuple[int, int, int]]]] = {
    "text": (["How many legs has a spider, and why so many?"], []),
    "one": ([None, "What is in this picture?"], [(*SMALL, 1)]),
    "two": (["Compare ", None, " and ", None, " for me."], [(*SMALL, 1), (*WIDE, 2)]),
    "same": ([None, None, "Are these the same?"], [(*SMALL, 3), (*SMALL, 3)]),
    "long": (["word " * 60, None, " and more " * 30], [(*WIDE, 4)]),
}


@cache
def language_model(family: str) -> LanguageModel:
    return LanguageModel.load(checkpoint(family))


def new_cache(model: LanguageModel, num_blocks: int = 256, block_size: int = BLOCK_SIZE) -> KVCache:
    facts = model.facts
    return KVCache(KVLayout(facts.num_layers, num_blocks, block_size, facts.num_kv_heads, facts.head_dim, model.dtype))


@dataclass(frozen=True)
class Case:
    """A prompt as the engine gets it, and the tokens that transformers continues it with."""

    token_ids: list[int]
    items: tuple[Item, ...]
    embeddings: list[torch.Tensor]
    expected: list[int]


@cache
def case(family: str, name: str, max_tokens: int = 12) -> Case:
    parts, sizes = CASES[name]
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    pictures = [image_file(width, height, seed) for width, height, seed in sizes]
    ref = reference(family)
    inputs = ref.inputs([{"role": "user", "content": content}], pictures)
    embeddings = encode(family, inputs) if sizes else []
    ids = inputs["input_ids"][0].tolist()
    items, begin = [], 0
    grids = inputs["image_grid_thw"].tolist() if sizes else []
    for grid, embedding in zip(grids, embeddings, strict=True):
        begin = ids.index(ref.model.config.image_token_id, begin)
        items.append(Item(f"{len(items):064x}", "image", tuple(grid), begin, len(embedding)))
        begin += len(embedding)
    return Case(ids, tuple(items), embeddings, ref.generate(inputs, max_tokens))


@torch.inference_mode()
def encode(family: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each image's embedding as an encoder sends it: the main columns, then each deepstack level's."""
    out = reference(family).model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    levels = getattr(out, "deepstack_features", None) or []
    return [torch.cat([main, *(level[i] for level in levels)], -1) for i, main in enumerate(out.pooler_output)]


@dataclass
class Driver:
    """Runs sequences to the end of their `max_tokens`. Blocks are handed out backwards: tables are never in order."""

    runner: Runner
    budget: int = 1 << 30
    chunk: int = 1 << 30
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.runner.cache.layout.num_blocks))
        self.ids = itertools.count()

    def sequence(
        self, token_ids: Listing[int], items: Listing[Item] = (), embeddings: Any = None, **params: Any
    ) -> Sequence:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})
        size = self.runner.cache.layout.block_size
        blocks = -(-(len(token_ids) + params.max_tokens) // size)
        table = [self.free.pop() for _ in range(blocks)]
        return Sequence(
            f"s{next(self.ids)}", list(token_ids), len(token_ids), params, tuple(items), embeddings, block_table=table
        )

    def of(self, case: Case, **params: Any) -> Sequence:
        return self.sequence(case.token_ids, case.items, case.embeddings, max_tokens=len(case.expected), **params)

    def step(self, sequences: Listing[Sequence]) -> None:
        """One step over as many tokens of the unfinished sequences as the budget allows."""
        batch, left = [], self.budget
        for seq in sequences:
            count = min(seq.remaining, self.chunk, left)
            if count and seq.num_output_tokens < seq.params.max_tokens:
                batch.append(Scheduled(seq, seq.num_computed, count, count == seq.remaining))
                left -= count
        self.steps.append(len(batch))
        sampled = iter(self.runner.run(batch))
        for entry in batch:
            entry.seq.num_computed += entry.count
            if entry.sample:
                entry.seq.token_ids.append(next(sampled).token_id)

    def finish(self, *sequences: Sequence) -> list[list[int]]:
        while any(seq.num_output_tokens < seq.params.max_tokens for seq in sequences):
            self.step(sequences)
        return [seq.output_ids for seq in sequences]


def driver(family: str, budget: int = 1 << 30, chunk: int = 1 << 30, **options: Any) -> Driver:
    model = language_model(family)
    return Driver(Runner(model, new_cache(model, **options)), budget, chunk)
