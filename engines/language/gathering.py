"""Attention by copying, on any device and in any dtype. Decodes attend in groups of similar length, one gather and one
kernel per group. A prefill chunk attends by itself: over its own keys when it begins its sequence, else over everything
gathered from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from engines.language.attention import Indices, Places, Query, Written, blocks, fill_tables, places
from engines.language.kv import KVCache

# Padding a group's shorter members costs at most as much as their own work; below this many blocks it is cheaper than
# another kernel call.
SMALL_GROUP_BLOCKS = 16

# How many bytes of keys a group gathers at most. On a CPU the attention kernel then finds them in the
# processor's cache: 32 sequences of 544 tokens took 3.2 ms instead of 4.7 ms a layer.
GATHER_NBYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, slots=True)
class Gather:
    """Which rows of the pack, of how many sequences, attend to which blocks.

    `keys` and `values` index `KVCache.layers[i]`, as many blocks for each sequence; the first `length` tokens of them
    count. `mask` is added to the scores and broadcasts over heads; None when every gathered token counts.
    """

    first: int
    last: int
    sequences: int
    keys: torch.Tensor
    values: torch.Tensor
    length: int
    mask: torch.Tensor | None


class Scratch:
    """Memory for gathered keys and values, kept from step to step.

    Fresh memory means page faults: gathering 36 MB took 25 ms into fresh memory and 3 ms into this.
    """

    def __init__(self, cache: KVCache) -> None:
        self._held = [cache.pool.new_empty(0), cache.pool.new_empty(0)]

    def gather(self, part: int, layer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`layer.index_select(0, rows)`, for `part` 0 (keys) or 1 (values); valid until the next call for that part."""
        count = rows.numel() * layer[0].numel()
        if self._held[part].numel() < count:
            self._held[part] = layer.new_empty(count)
        return torch.index_select(layer, 0, rows, out=self._held[part][:count].view(-1, *layer.shape[1:]))


class Gathering:
    """The backend over one cache."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._scratch = Scratch(cache)

    def plan(self, queries: Sequence[Query], written: Written) -> GatheringStep:
        cache, size = self._cache, self._cache.layout.block_size
        where = places(cache, queries, written)
        singles = sum(query.count == 1 for query in queries)
        limit = max(1, 2 * GATHER_NBYTES.get(cache.pool.device.type, 4 << 20) // cache.layout.block_nbytes)
        cuts = groups([blocks(query, size) for query in queries[:singles]], limit)
        decodes = [gather_decodes(cache, queries[a:b], a) for a, b in cuts]
        chunks, starts, first = [], [], singles
        for query in queries[singles:]:
            if query.start:
                chunks.append(gather_chunk(cache, query, first))
            else:
                starts.append((first, first + query.count))
            first += query.count
        return GatheringStep(where, self._scratch, tuple(decodes), tuple(chunks), tuple(starts))


@dataclass(frozen=True, slots=True)
class GatheringStep:
    places: Places
    scratch: Scratch
    decodes: tuple[Gather, ...]
    chunks: tuple[Gather, ...]  # prefill that continues a sequence
    starts: tuple[tuple[int, int], ...]  # first and last row of each prefill that begins a sequence

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        cache = self.places.cache
        held, tail = cache.layers[layer], layer == cache.layout.num_layers - 1
        out = query.new_zeros(query.shape) if tail else torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in self.decodes:
            part = slice(group.first, group.last)
            out[part] = attend_decodes(query[part], *self._gather(held, group), group.mask, scaling)
        for first, last in self.starts:
            part, whole = slice(last - 1 if tail else first, last), slice(first, last)
            out[part] = attend_chunk(query[part], batched(key[whole]), batched(value[whole]), None, scaling)
        for chunk in self.chunks:
            part, mask = slice(chunk.last - 1 if tail else chunk.first, chunk.last), None if tail else chunk.mask
            out[part] = attend_chunk(query[part], *self._gather(held, chunk), mask, scaling)
        return out

    def _gather(self, held: torch.Tensor, group: Gather) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a group's blocks out of a layer: keys and values, each `[sequences, kv_heads, length, head_dim]`."""
        keys, values = (
            self.scratch.gather(part, held, rows)
            .view(group.sequences, -1, *held.shape[2:])[:, : group.length]
            .transpose(1, 2)
            for part, rows in enumerate((group.keys, group.values))
        )
        return keys, values


def groups(counts: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut a descending list of block counts into groups, as (first, last) pairs.

    A cut is made where padding to the longest would more than double the work, or the group gather more than `limit`.

    >>> list(groups([100, 90, 40, 20, 3], 1000))
    [(0, 2), (2, 4), (4, 5)]
    >>> list(groups([100, 90, 80, 70], 200))
    [(0, 2), (2, 4)]
    """
    first = 0
    for index in range(1, len(counts) + 1):
        if index < len(counts):
            padded = (index + 1 - first) * counts[first]
            if padded <= limit and counts[first] <= max(2 * counts[index], SMALL_GROUP_BLOCKS):
                continue
        yield first, index
        first = index


def gather_decodes(cache: KVCache, queries: Sequence[Query], first: int) -> Gather:
    size = cache.layout.block_size
    table = np.zeros((len(queries), blocks(queries[0], size)), np.int64)
    fill_tables(table, queries, size)
    stops = torch.tensor([query.stop for query in queries])
    length = int(stops.max())
    mask = None
    if int(stops.min()) < length:
        beyond = torch.arange(length) >= stops[:, None]
        mask = torch.zeros(beyond.shape, dtype=cache.layout.dtype).masked_fill_(beyond, float("-inf"))[:, None, None]
    return located(cache, table, (first, first + len(queries)), length, mask)


def gather_chunk(cache: KVCache, query: Query, first: int) -> Gather:
    table = np.asarray([query.block_table[: blocks(query, cache.layout.block_size)]], np.int64)
    mask = torch.full((query.count, query.stop), float("-inf"), dtype=cache.layout.dtype).triu_(query.start + 1)
    return located(cache, table, (first, first + query.count), query.stop, mask)


def located(cache: KVCache, table: Indices, rows: tuple[int, int], length: int, mask: torch.Tensor | None) -> Gather:
    """A gather of `table`, `[sequences, blocks]`, on the cache's device."""
    device = cache.pool.device
    keys = torch.from_numpy(2 * table.ravel()).to(device)
    return Gather(*rows, len(table), keys, keys + 1, length, mask if mask is None else mask.to(device))


def batched(tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, head_dim]` as the kernel has it, `[1, heads, tokens, head_dim]`."""
    return tokens.transpose(0, 1)[None]


def attend_decodes(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`query` and the result are `[n, heads, head_dim]`.

    Query heads that share a KV head ride in the query axis of the kernel: KV is never repeated.
    """
    packed = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    return scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling).reshape(query.shape)


def attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`query` and the result are `[n, heads, head_dim]`.

    Without a mask a single token sees every key, and the i-th of several the first i.
    """
    causal = mask is None and len(query) > 1
    out = scaled_dot_product_attention(
        batched(query), keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)
