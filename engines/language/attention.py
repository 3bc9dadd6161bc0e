"""Attention over a paged KV cache, for many sequences packed into one row of tokens. It knows no model: transformers'
own layers call it by name (`NAME`) and pass the `Step` of the moment through.

A step's tokens lie in one `[1, T]` row, single-token queries (decodes) first:

    | decode | decode | … | prefill chunk …………… | prefill chunk …… |

Each layer first writes the keys and values of all T tokens to their places in the cache. Decodes then attend in
groups of similar length, one gather and one kernel per group. A prefill chunk attends by itself: over its own keys
when it begins its sequence, else over everything gathered from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engines.language.kv import KVCache

Indices: TypeAlias = npt.NDArray[np.int64]

NAME = "triptych_paged"

# Padding a group's shorter members costs at most as much as their own work; below this many blocks it is cheaper than
# another kernel call.
SMALL_GROUP_BLOCKS = 16

# How many bytes of keys a group gathers at most. On a CPU the attention kernel then finds them in the
# processor's cache: 32 sequences of 544 tokens took 3.2 ms instead of 4.7 ms a layer.
GATHER_NBYTES = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass(frozen=True, slots=True)
class Query:
    """One sequence's share of a step: `count` tokens from index `start` on, with the blocks that hold its KV."""

    block_table: Sequence[int]
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


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


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer needs in one step. Built once, read by all layers; valid for that step only."""

    cache: KVCache
    scratch: Scratch
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    decodes: tuple[Gather, ...]
    chunks: tuple[Gather, ...]  # prefill that continues a sequence
    starts: tuple[tuple[int, int], ...]  # first and last row of each prefill that begins a sequence
    written: Callable[[int], None]  # told each layer's index when its KV of the whole step is in the cache


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


def plan(cache: KVCache, scratch: Scratch, queries: Sequence[Query], written: Callable[[int], None]) -> Step:
    """Lay out a step. `queries` are in pack order: single tokens first, of these the longest sequence first.

    :raises IndexError: a block table is too short for its sequence.
    """
    device, size = cache.pool.device, cache.layout.block_size
    rows = torch.from_numpy(np.concatenate([key_rows(cache, query) for query in queries])).to(device)
    singles = sum(query.count == 1 for query in queries)
    limit = max(1, 2 * GATHER_NBYTES.get(device.type, 4 << 20) // cache.layout.block_nbytes)
    cuts = groups([blocks(query, size) for query in queries[:singles]], limit)
    decodes = [gather_decodes(cache, queries[a:b], a) for a, b in cuts]
    chunks, starts, first = [], [], singles
    for query in queries[singles:]:
        if query.start:
            chunks.append(gather_chunk(cache, query, first))
        else:
            starts.append((first, first + query.count))
        first += query.count
    return Step(cache, scratch, rows, rows + size, tuple(decodes), tuple(chunks), tuple(starts), written)


def blocks(query: Query, block_size: int) -> int:
    """How many blocks hold the sequence up to the end of this query."""
    return -(-query.stop // block_size)


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


def key_rows(cache: KVCache, query: Query) -> Indices:
    """The rows of `KVCache.rows` for the keys of each token of a query."""
    size = cache.layout.block_size
    if query.stop > len(query.block_table) * size:
        raise IndexError(f"{len(query.block_table)} blocks of {size} cannot hold {query.stop} tokens")
    if query.count == 1:
        block, offset = divmod(query.start, size)
        return np.array([cache.key_row(query.block_table[block], offset)])
    token = np.arange(query.start, query.stop)
    return np.asarray(query.block_table, np.int64)[token // size] * (2 * size) + token % size


def gather_decodes(cache: KVCache, queries: Sequence[Query], first: int) -> Gather:
    size = cache.layout.block_size
    counts = [blocks(query, size) for query in queries]
    table = np.zeros((len(queries), counts[0]), np.int64)
    for row, query, count in zip(table, queries, counts, strict=True):
        row[:count] = query.block_table[:count]
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


def gather(step: Step, layer: torch.Tensor, group: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a group's blocks out of the cache: keys and values, each `[sequences, kv_heads, length, head_dim]`."""
    keys, values = (
        step.scratch.gather(part, layer, rows)
        .view(group.sequences, -1, *layer.shape[2:])[:, : group.length]
        .transpose(1, 2)
        for part, rows in enumerate((group.keys, group.values))
    )
    return keys, values


def attend_decodes(step: Step, layer: torch.Tensor, query: torch.Tensor, group: Gather, scaling: float) -> torch.Tensor:
    """`query` and the result are `[n, heads, head_dim]`.

    Query heads that share a KV head ride in the query axis of the kernel: KV is never repeated.
    """
    keys, values = gather(step, layer, group)
    packed = query.view(len(query), layer.shape[2], -1, query.shape[-1])
    out = scaled_dot_product_attention(packed, keys, values, attn_mask=group.mask, scale=scaling)
    return out.reshape(query.shape)


def attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`query` is `[1, heads, n, head_dim]`, the result `[n, heads, head_dim]`.

    Without a mask a single token sees every key, and the i-th of several the first i.
    """
    causal = mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    step: Step,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` is `[1, heads, T, head_dim]`, the result `[1, T, heads, head_dim]`.

    Causality comes from the step; `attention_mask` must be None. In the last layer nothing reads a chunk's rows but its
    last one: the others are zeros there.
    """
    index: int = module.layer_idx  # type: ignore[assignment]
    layout, rows, layer = step.cache.layout, step.cache.rows[index], step.cache.layers[index]
    rows.index_copy_(0, step.key_rows, key[0].transpose(0, 1))
    rows.index_copy_(0, step.value_rows, value[0].transpose(0, 1))
    step.written(index)

    tail = index == layout.num_layers - 1
    tokens = query[0].transpose(0, 1)
    out = tokens.new_zeros(tokens.shape) if tail else torch.empty_like(tokens, memory_format=torch.contiguous_format)
    for group in step.decodes:
        part = slice(group.first, group.last)
        out[part] = attend_decodes(step, layer, tokens[part], group, scaling)
    for first, last in step.starts:
        part, held = slice(last - 1 if tail else first, last), slice(first, last)
        out[part] = attend_chunk(query[:, :, part], key[:, :, held], value[:, :, held], None, scaling)
    for chunk in step.chunks:
        part, mask = slice(chunk.last - 1 if tail else chunk.first, chunk.last), None if tail else chunk.mask
        out[part] = attend_chunk(query[:, :, part], *gather(step, layer, chunk), mask, scaling)
    return out[None], None


AttentionInterface.register(NAME, paged_attention)
