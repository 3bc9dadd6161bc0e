"""Attention over a paged KV cache, for many sequences packed into one row of tokens. It knows no model: transformers'
own layers call it by name (`NAME`) and pass the `Step` of the moment through.

A step's tokens lie in one `[1, T]` row: single-token queries (decodes) first, then the longest sequence first, so that
prefill that begins its sequence comes last:

    | decode | decode | … | prefill chunk …………… | prefill chunk …… | whole prompt …… |

Each layer first writes the keys and values of all T tokens to their places in the cache; how queries then attend is the
backend's: `gathering` copies what they need out of the cache and runs anywhere, `varlen` has a kernel that reads it
where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface

from engines.devices import onto
from engines.language.kv import KVCache

Indices: TypeAlias = npt.NDArray[np.int64]
Written: TypeAlias = Callable[[int], None]
"""Told each layer's index when its KV of the whole step is in the cache."""

NAME = "triptych_paged"


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
class Places:
    """Where a step's tokens lie in the cache: rows of `KVCache.rows`, `[T]`."""

    cache: KVCache
    keys: torch.Tensor
    values: torch.Tensor
    written: Written

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Both `[T, kv_heads, head_dim]`."""
        rows = self.cache.rows[layer]
        rows.index_copy_(0, self.keys, key)
        rows.index_copy_(0, self.values, value)
        self.written(layer)


class Step(Protocol):
    """What every layer needs in one step. Built once, read by all layers; valid for that step only."""

    @property
    def places(self) -> Places: ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """`[T, heads, head_dim]`, the keys and values with their own number of heads; the result is as `query`.

        The step's KV is in the cache. In the last layer nothing reads a chunk's rows but its last one: the others are
        zeros there.
        """


class Backend(Protocol):
    """A way to attend. One step at a time: the next plan may reuse the memory of the last."""

    def plan(self, queries: Sequence[Query], written: Written) -> Step:
        """Lay out a step over `queries` in pack order. Raises IndexError: a block table is too short."""


def places(cache: KVCache, queries: Sequence[Query], written: Written) -> Places:
    """:raises IndexError: a block table is too short for its sequence."""
    rows = onto(np.concatenate([key_rows(cache, query) for query in queries]), cache.pool.device)
    return Places(cache, rows, rows + cache.layout.block_size, written)


def blocks(query: Query, block_size: int) -> int:
    """How many blocks hold the sequence up to the end of this query."""
    return -(-query.stop // block_size)


def fill_tables(tables: npt.NDArray[Any], queries: Sequence[Query], block_size: int) -> None:
    """Write the blocks of each query's sequence into its row of `tables`, `[queries or more, blocks or more]`."""
    for row, query in zip(tables[: len(queries)], queries, strict=True):
        used = blocks(query, block_size)
        row[:used] = query.block_table[:used]


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

    Causality comes from the step; `attention_mask` must be None.
    """
    index: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    step.places.write(index, key, value)
    return step.attend(index, query, key, value, scaling)[None], None


AttentionInterface.register(NAME, paged_attention)
