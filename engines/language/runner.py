"""Runs one step: packs what was scheduled into one row of tokens, runs the model over it, and samples where a
sequence ends. It decides nothing about what runs, and changes no sequence except to give it dice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from engines.devices import onto
from engines.errors import SetupError
from engines.language.attention import Backend, Indices, Query, Written
from engines.language.embedding_rows import Rows
from engines.language.fusing import fuse
from engines.language.gathering import Gathering
from engines.language.graphs import Captures, DecodeGraphs
from engines.language.kv import KVCache
from engines.language.model import Deepstack, LanguageModel
from engines.language.positions import Positions
from engines.language.sampler import Sampled, Sampler
from engines.language.sequence import Scheduled, Sequence
from engines.language.varlen import COPIED_TOKENS, Varlen, backend_of, copied

OnLayers = Callable[[int, int], None]


class BadEmbeddings(Exception):
    """The vision embeddings of `sequence` are missing or do not fit its prompt. Raised before the model runs."""

    def __init__(self, sequence: Sequence, message: str) -> None:
        super().__init__(f"{sequence.id}: {message}")
        self.sequence = sequence


@dataclass(frozen=True, slots=True)
class Patch:
    """Rows of the pack, from `first` on, that an item's embedding replaces; `[n, hidden * (1 + levels)]`."""

    first: int
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pack:
    """One step's inputs, in pack order and host memory: `token_ids` `[T]`, `positions` `[3, T]`.

    `last_rows[i]` is the row whose logits the i-th sampling sequence of the batch needs.
    """

    token_ids: Indices
    positions: Indices
    queries: tuple[Query, ...]
    patches: tuple[Patch, ...]
    last_rows: tuple[int, ...]


class Runner:
    """Owns the use of one model and one cache. Not thread safe: one step at a time, in one thread."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        layers_per_push: int = 1,
        sampler: Sampler | None = None,
        backend: Backend | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if cache.pool.device.type != model.device.type:
            raise SetupError(
                f"the KV cache is in {cache.pool.device.type} memory, but the model on {model.device.type}"
            )
        self.model = model
        self.cache = cache
        self.backend = backend or Gathering(cache)
        self.graphs = graphs
        self.layers_per_push = layers_per_push
        self.sampler = sampler or Sampler(model.facts.eos_token_ids)

    @torch.inference_mode()
    def run(self, batch: Listing[Scheduled], on_layers: OnLayers | None = None) -> list[Sampled]:
        """Compute the KV of every scheduled token; one `Sampled` per entry with `sample`, in the batch's order.

        `on_layers(first, last)` is called in this thread once the KV of layers `first` to `last - 1` is in the cache
        for the whole batch, a group of at most `layers_per_push` layers at a time, while later layers are still to be
        computed.

        :raises BadEmbeddings: before anything is computed.
        """
        if not batch:
            return []
        logits = self.forward(self.pack(batch), on_layers)
        return self.sampler.sample(logits, [entry.seq for entry in batch if entry.sample])

    @torch.inference_mode()
    def forward(self, pack: Pack, on_layers: OnLayers | None = None) -> torch.Tensor:
        """Run the model over a pack: the logits of its `last_rows`, `[n, vocab]`."""
        device = self.model.device
        rows = onto(np.array(pack.last_rows, np.int64), device)
        if self.graphs is not None and on_layers is None and not pack.patches and self.graphs.takes(pack.queries):
            return self.graphs.run(pack.token_ids, pack.positions, pack.queries).index_select(0, rows)
        step = self.backend.plan(pack.queries, self._groups(on_layers))
        hidden, deepstack = self._embed(pack)
        return self.model(hidden, onto(pack.positions, device), step, deepstack, rows)  # type: ignore[no-any-return]

    def pack(self, batch: Listing[Scheduled]) -> Pack:
        """The inputs of every token, in the order that attention wants: single tokens first, of these longest first."""
        order = sorted(range(len(batch)), key=lambda i: (batch[i].count > 1, -batch[i].start))
        total = sum(entry.count for entry in batch)
        ids: list[int] = []
        positions = np.empty((3, total), np.int64)
        patches: list[Patch] = []
        last_row: dict[int, int] = {}
        for index in order:
            entry, first = batch[index], len(ids)
            stop = entry.start + entry.count
            ids += entry.seq.token_ids[entry.start : stop]
            self._positions(entry.seq).fill(positions[:, first : first + entry.count], entry.start)
            patches += patches_of(entry, first, self.model.facts.embedding_width)
            last_row[index] = len(ids) - 1
        return Pack(
            token_ids=np.array(ids, np.int64),
            positions=positions,
            queries=tuple(Query(batch[i].seq.block_table, batch[i].start, batch[i].count) for i in order),
            patches=tuple(patches),
            last_rows=tuple(last_row[i] for i, entry in enumerate(batch) if entry.sample),
        )

    def _positions(self, seq: Sequence) -> Positions:
        if seq.positions is None:
            seq.positions = Positions.build(seq.items, self.model.facts.merge_size, self.model.facts.mrope)
        return cast(Positions, seq.positions)

    def _embed(self, pack: Pack) -> tuple[torch.Tensor, list[Deepstack]]:
        hidden = self.model.embed(onto(pack.token_ids, self.model.device))
        size, levels = self.model.facts.hidden_size, self.model.facts.deepstack_levels
        deepstack = []
        for patch in pack.patches:
            # not non_blocking: their memory goes to other rows once this step is over
            rows = patch.rows.to(device=hidden.device, dtype=hidden.dtype)
            hidden[patch.first : patch.first + len(rows)] = rows[:, :size]
            if levels:
                deepstack.append(Deepstack(patch.first, rows[:, size:].view(len(rows), levels, size)))
        return hidden, deepstack

    def _groups(self, on_layers: OnLayers | None) -> Written:
        """Turn "layer i is written" into "this group of layers is written". The last layer goes alone: nothing is
        computed behind it that would hide much."""
        if on_layers is None:
            return lambda layer: None
        last, size, first = self.model.facts.num_layers - 1, self.layers_per_push, 0

        def written(layer: int) -> None:
            nonlocal first
            if layer >= last - 1 or (layer + 1) % size == 0:
                on_layers(first, layer + 1)
                first = layer + 1

        return written


def runner_of(
    model: LanguageModel,
    cache: KVCache,
    attention: str = "auto",
    decoding: tuple[int, int] | None = None,
    layers_per_push: int = 1,
) -> Runner:
    """The one that suits the device; the model is changed for it. `attention` is the flag; `decoding` tells how many
    sequences of how many tokens each graphs are captured for, where there can be graphs.

    :raises SetupError: the attention that was asked for cannot run here.
    """
    backend, graphs = backend_of(attention, cache, model.facts.num_heads), None
    if model.device.type == "cuda":
        fuse(model)
        if decoding is not None:
            most, longest = decoding
            paged = backend
            if not isinstance(paged, Varlen):
                paged, longest = Varlen(cache, copied), min(longest, COPIED_TOKENS)
            graphs = DecodeGraphs(model, cache, paged, most, longest, Captures(model.device))
    return Runner(model, cache, layers_per_push, backend=backend, graphs=graphs)


def patches_of(entry: Scheduled, first: int, width: int) -> Iterator[Patch]:
    """The item rows that fall into a chunk; an item may begin before it and end behind it.

    :raises BadEmbeddings: an item of the chunk has no embedding, one of another shape, or one with infinite or
    undefined numbers.
    """
    seq, stop = entry.seq, entry.start + entry.count
    for number, item in enumerate(seq.items):
        begin, end = max(item.offset, entry.start), min(item.offset + item.num_tokens, stop)
        if begin >= end:
            continue
        embedding = embedding_of(seq, number)
        if embedding is None:
            raise BadEmbeddings(
                seq, f"tokens {begin} to {end - 1} belong to item {item.mm_hash}, whose embedding is not here"
            )
        if embedding.shape != (item.num_rows, width):
            told = f"is {list(embedding.shape)}, the model needs {[item.num_rows, width]}"
            raise BadEmbeddings(seq, f"the embedding of item {item.mm_hash} {told}")
        at = item.row - item.offset
        rows = embedding[at + begin : at + end]
        # A NaN here would stay in the freed blocks and, through the masked tail of a block, reach the next sequence
        # that gets them.
        if not bool(torch.isfinite(rows).all()):
            raise BadEmbeddings(seq, f"the embedding of item {item.mm_hash} holds numbers that are not finite")
        yield Patch(first + begin - entry.start, rows)


def embedding_of(seq: Sequence, number: int) -> Rows | torch.Tensor | None:
    held = cast("Listing[Rows | torch.Tensor | None] | None", seq.embeddings)
    return held[number] if held is not None and number < len(held) else None
