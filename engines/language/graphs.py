"""Decode steps without the host: one CUDA graph per batch size and length, over inputs that stay where they are and
change in place. It decides nothing about what runs; a step that it does not take runs as any other.

    bucket 8:   ids | positions | key rows | lengths | block tables       one row per sequence
                 5 sequences, then 3 rows of padding: token 0 in the cache's scratch block, which nobody reads

Replaying a graph costs the host one launch where a model's layers cost thousands.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from engines.devices import into
from engines.language.attention import Indices, Places, Query, blocks, fill_tables, key_rows
from engines.language.kv import KVCache
from engines.language.model import LanguageModel
from engines.language.varlen import Pages, Varlen

Work = Callable[[], torch.Tensor]
Capture = Callable[[Work], Work]
"""Makes of some work on a device something that does it again, on the same memory, with the same memory as result."""

EVERY = 8
"""From so many sequences on, buckets are multiples of it: at most so many rows less one are padding."""
SHORT, LONGER = 2048, 4
"""Tokens that the narrowest graphs hold, and how many times as many each wider one: a kernel that is told of far more
tokens than there are divides its work into parts that are empty."""


class Captures:
    """Captures CUDA graphs that share their memory: the result of one is gone when another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of this process may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def _warm_up(self, work: Work) -> None:
        """What libraries set up in their first calls must not be part of a graph."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)


def buckets(most: int) -> list[int]:
    """Batch sizes up to `most`.

    >>> buckets(20)
    [1, 2, 4, 8, 16, 20]
    """
    return sorted({size for size in (1, 2, 4, *range(EVERY, most, EVERY)) if size < most} | {most})


def widths(most: int, block_size: int) -> list[int]:
    """Blocks of a sequence up to `most`.

    >>> widths(100, 256)
    [8, 32, 100]
    """
    found = [max(1, SHORT // block_size)]
    while found[-1] < most:
        found.append(found[-1] * LONGER)
    return [*found[:-1], most]


class Inputs:
    """What one graph reads, on the device: `rows` sequences of up to `width` blocks."""

    def __init__(self, cache: KVCache, rows: int, width: int) -> None:
        if cache.scratch_block is None:
            raise ValueError("a cache in a transfer's arena has no scratch block for padding")
        self.cache = cache
        self._scratch = cache.scratch_block
        device = cache.pool.device
        self._numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self._pages = torch.zeros(rows * (1 + width), dtype=torch.int32, device=device)
        self._ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.rows = torch.arange(rows, device=device)
        self.token_ids, self.positions, self._keys = self._numbers[0], self._numbers[1:4], self._numbers[4]
        self._lengths, self._tables = self._pages[:rows], self._pages[rows:].view(rows, width)
        self.fill(np.empty(0, np.int64), np.empty((3, 0), np.int64), ())

    def fill(self, token_ids: Indices, positions: Indices, queries: Sequence[Query]) -> None:
        """Put this step's inputs where the graph finds them; rows that are left are padding."""
        (rows, width), count = self._tables.shape, len(queries)
        numbers, lengths = np.zeros((5, rows), np.int64), np.ones(rows, np.int32)
        tables = np.full((rows, width), self._scratch, np.int32)
        numbers[4] = self.cache.key_row(self._scratch, 0)
        numbers[0, :count], numbers[1:4, :count] = token_ids, positions
        for row, query in enumerate(queries):
            numbers[4, row : row + 1] = key_rows(self.cache, query)
            lengths[row] = query.stop
        fill_tables(tables, queries, self.cache.layout.block_size)
        into(self._numbers, numbers)
        into(self._pages, np.concatenate((lengths, tables.ravel())))

    def places(self) -> Places:
        return Places(self.cache, self._keys, self._keys + self.cache.layout.block_size, lambda layer: None)

    def pages(self) -> Pages:
        """With the widest bounds: a graph keeps those that it is captured with."""
        ends = pad(self._lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = self._tables.shape[1] * self.cache.layout.block_size
        return Pages(self._ends, self._lengths, ends, self._tables, 1, longest)


def decode(model: LanguageModel, backend: Varlen, inputs: Inputs) -> torch.Tensor:
    """The logits of every row, `[rows, vocab]`."""
    step = backend.decoding(inputs.pages(), inputs.places())
    hidden = model.embed(inputs.token_ids)
    return model(hidden, inputs.positions, step, (), inputs.rows)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Bucket:
    inputs: Inputs
    replay: Work


class DecodeGraphs:
    """The graphs of one model over one cache, captured as they are made, and run in the model thread."""

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, cache: KVCache, backend: Varlen, most: int, max_tokens: int, capture: Capture
    ) -> None:
        """For batches up to `most` sequences of up to `max_tokens` tokens. Raises ValueError: no block for padding."""
        self._max_tokens, self._block_size = max_tokens, cache.layout.block_size
        self._sizes, self._widths = buckets(most), widths(-(-max_tokens // self._block_size), self._block_size)

        def made(rows: int, width: int) -> Bucket:
            inputs = Inputs(cache, rows, width)
            return Bucket(inputs, capture(lambda: decode(model, backend, inputs)))

        # the largest first: the others find their memory in what it left
        shapes = [(rows, width) for rows in reversed(self._sizes) for width in reversed(self._widths)]
        self._buckets = {shape: made(*shape) for shape in shapes}

    def takes(self, queries: Sequence[Query]) -> bool:
        """Whether these are decodes alone, neither more nor longer than there is a graph for."""
        if len(queries) > self._sizes[-1]:
            return False
        return all(query.count == 1 and query.stop <= self._max_tokens for query in queries)

    def run(self, token_ids: Indices, positions: Indices, queries: Sequence[Query]) -> torch.Tensor:
        """The logits of each query, `[n, vocab]`, until the next run. `token_ids` is `[n]`, `positions` `[3, n]`."""
        longest = max(blocks(query, self._block_size) for query in queries)
        rows, width = bisect_left(self._sizes, len(queries)), bisect_left(self._widths, longest)
        bucket = self._buckets[self._sizes[rows], self._widths[width]]
        bucket.inputs.fill(token_ids, positions, queries)
        return bucket.replay()[: len(queries)]
