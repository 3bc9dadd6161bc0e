"""Attention by a kernel that reads the paged cache where it lies: `torch.nn.attention.varlen`, which is FlashAttention.

At most three calls per layer, whatever is in the step: one over all decodes, one over all chunks that continue a
sequence, one over all prompts that begin, whose keys need not be looked up. In the last layer one, over the last row of
each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from engines.devices import onto
from engines.errors import SetupError
from engines.language.attention import Backend, Places, Query, Written, blocks, fill_tables, places
from engines.language.gathering import Gathering
from engines.language.kv import KVCache, KVLayout

log = logging.getLogger(__name__)

PAGE = 256
"""FlashAttention 2 reads pages of a multiple of so many tokens."""
COPIED_TOKENS = 8192
HALVES = (torch.bfloat16, torch.float16)
CAUSAL, EVERYTHING = (-1, 0), (-1, -1)
"""Windows. A single query that sees all its keys is causal too; told so, the kernel would not split long sequences over
the processors, nor put the heads that share keys side by side."""

Int32: npt.DTypeLike = np.int32


class Kernel(Protocol):
    """`torch.nn.attention.varlen.varlen_attn`: causality is aligned to the last key; all index tensors are int32."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = EVERYTHING,
        enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Pages:
    """Some queries' keys in the cache. `ends` `[n + 1]` are where each sequence's query rows end, `lengths` `[n]` its
    tokens, `key_ends` their sums, `tables` `[n, blocks]`; `most` and `longest` bound query rows and tokens.
    """

    ends: torch.Tensor
    lengths: torch.Tensor
    key_ends: torch.Tensor
    tables: torch.Tensor
    most: int
    longest: int

    @classmethod
    def of(cls, queries: Sequence[Query], counts: Sequence[int], size: int, device: torch.device) -> Pages:
        """`counts` of the last rows of each of `queries` attend."""
        lengths = [query.stop for query in queries]
        table = np.zeros((len(queries), blocks(max(queries, key=lambda query: query.stop), size)), Int32)
        fill_tables(table, queries, size)
        return cls(
            sums(counts, device),
            onto(np.array(lengths, Int32), device),
            sums(lengths, device),
            onto(table, device),
            max(counts),
            max(lengths),
        )

    def attend(self, kernel: Kernel, query: torch.Tensor, pool: torch.Tensor, scaling: float) -> torch.Tensor:
        """`query` is `[rows, heads, head_dim]`, `pool` one layer as `[blocks, 2, block_size, kv_heads, head_dim]`."""
        found: torch.Tensor = kernel(
            query,
            pool[:, 0],
            pool[:, 1],
            self.ends,
            self.key_ends,
            self.most,
            self.longest,
            scale=scaling,
            window_size=CAUSAL if self.most > 1 else EVERYTHING,
            enable_gqa=True,
            seqused_k=self.lengths,
            block_table=self.tables,
        )
        return found


@dataclass(frozen=True, slots=True)
class Starts:
    """Prompts that begin in this step: their keys are in its own rows. `ends` `[n + 1]`."""

    ends: torch.Tensor
    longest: int

    def attend(
        self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        found: torch.Tensor = kernel(
            query,
            key,
            value,
            self.ends,
            self.ends,
            self.longest,
            self.longest,
            scale=scaling,
            window_size=CAUSAL,
            enable_gqa=True,
        )
        return found


def sums(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """0 and the running sums, `[n + 1]`."""
    return onto(np.array([0, *accumulate(counts)], Int32), device)


class Varlen:
    """The backend over one cache, whose block size suits the kernel."""

    def __init__(self, cache: KVCache, kernel: Kernel = varlen_attn) -> None:
        self._cache = cache
        self._kernel = kernel

    def plan(self, queries: Sequence[Query], written: Written) -> VarlenStep:
        size, device = self._cache.layout.block_size, self._cache.pool.device
        where = places(self._cache, queries, written)
        singles = sum(query.count == 1 for query in queries)
        begun = sum(query.count == 1 or query.start > 0 for query in queries)
        counts = [query.count for query in queries]
        ends = [0, *accumulate(counts)]
        groups = [
            (slice(ends[first], ends[last]), Pages.of(queries[first:last], counts[first:last], size, device))
            for first, last in ((0, singles), (singles, begun))
            if first < last
        ]
        starts = Starts(sums(counts[begun:], device), max(counts[begun:])) if begun < len(queries) else None
        if singles == len(queries):
            return VarlenStep(where, self._kernel, groups, None, singles)
        rows = onto(np.array(ends[1:], np.int64) - 1, device)
        tail = Tail(rows, Pages.of(queries, [1] * len(queries), size, device))
        return VarlenStep(where, self._kernel, groups, starts, ends[begun], tail)

    def decoding(self, pages: Pages, where: Places) -> VarlenStep:
        """A step of single tokens alone, over tensors that may change from one run to the next."""
        return VarlenStep(where, self._kernel, [(slice(None), pages)], None, 0)


@dataclass(frozen=True, slots=True)
class Tail:
    """The last row of each sequence's share of the step, `[n]`, and its keys."""

    rows: torch.Tensor
    pages: Pages


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """`groups` and then `starts`, from row `begin` on, are all rows in order. No `tail`: every row is a last one."""

    places: Places
    kernel: Kernel
    groups: Sequence[tuple[slice, Pages]]
    starts: Starts | None
    begin: int
    tail: Tail | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        cache = self.places.cache
        pool = cache.pool[layer]
        if self.tail is not None and layer == cache.layout.num_layers - 1:
            found = self.tail.pages.attend(self.kernel, query[self.tail.rows], pool, scaling)
            return query.new_zeros(query.shape).index_copy_(0, self.tail.rows, found)
        parts = [pages.attend(self.kernel, query[rows], pool, scaling) for rows, pages in self.groups]
        if self.starts is not None:
            new = slice(self.begin, None)
            parts.append(self.starts.attend(self.kernel, query[new], key[new], value[new], scaling))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def copied(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = EVERYTHING,
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """A `Kernel` for decodes alone, where torch's own does not read pages: it copies them all, whatever the lengths, so
    that its shapes are always the same and a graph can hold it. Up to `COPIED_TOKENS` that is not too much.
    """
    assert max_q == 1
    assert seqused_k is not None
    assert block_table is not None
    keys, values = (pages[block_table].flatten(1, 2).transpose(1, 2) for pages in (key, value))
    seen = torch.arange(keys.shape[2], device=query.device) < seqused_k[:, None]
    packed = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    found = scaled_dot_product_attention(packed, keys, values, attn_mask=seen[:, None, None], scale=scale)
    return found.reshape(query.shape)


def block_size_for(name: str, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a KV block where nobody said how many."""
    return PAGE if wanted(name, dtype, device) else 16


def wanted(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether --attention asks for the kernel; `auto` does where it can run."""
    return name == "varlen" or (name == "auto" and device.type == "cuda" and dtype in HALVES)


def backend_of(name: str, cache: KVCache, num_heads: int, kernel: Kernel = varlen_attn) -> Backend:
    """What --attention means for this cache: `auto`, `gather` or `varlen`. Raises SetupError: that cannot run here."""
    layout, device = cache.layout, cache.pool.device
    if not wanted(name, layout.dtype, device):
        return Gathering(cache)
    if layout.block_size % PAGE:
        raise SetupError(
            f"--block-size {layout.block_size}: --attention varlen needs a multiple of {PAGE}; "
            "--attention gather takes any, and is slower"
        )
    try:
        probe(layout, num_heads, device, kernel)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if name == "varlen":
            raise SetupError(f"--attention varlen cannot run here: {reason}") from None
        log.warning("attention copies keys and values out of the cache, which is slow: %s", reason)
        return Gathering(cache)
    return Varlen(cache, kernel)


def probe(layout: KVLayout, num_heads: int, device: torch.device, kernel: Kernel) -> None:
    """One token attends to one page. Raises what the kernel has against this device, dtype or shape."""
    pool = torch.zeros(1, 2, *layout.half_shape, dtype=layout.dtype, device=device)
    query = torch.zeros(1, num_heads, layout.head_dim, dtype=layout.dtype, device=device)
    Pages.of([Query([0], 0, 1)], [1], layout.block_size, device).attend(kernel, query, pool, layout.head_dim**-0.5)
