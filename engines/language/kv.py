"""The paged KV cache: where every token's keys and values lie in one region of bytes. It allocates no blocks and
moves no bytes between engines; it says which bytes they are.

The region, drawn for one layer (`L` layers follow one another):

    layer i:  | block 0           | block 1           | …           | block N-1         |
    block b:  | K of its tokens          | V of its tokens          |
    K:        | token 0 | token 1 | …    |   each [kv_heads, head_dim]

One layer's part of a block is one run of bytes (`block_nbytes`), so consecutive block numbers of a layer are one run
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engines.dtypes import name_of
from engines.language.mirror import Mirror, Ready
from engines.transfer.base import LayoutMismatch


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a cache. Two engines may exchange KV when everything but `num_blocks` agrees."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def half_shape(self) -> tuple[int, int, int]:
        """The keys, or the values, of one block of one layer."""
        return (self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def layer_nbytes(self) -> int:
        return self.num_blocks * self.block_nbytes

    @property
    def nbytes(self) -> int:
        return self.num_layers * self.layer_nbytes

    def spans(self, layers: Iterable[int], block_ids: Sequence[int]) -> list[tuple[int, int]]:
        """The (offset, length) runs of these blocks in these layers, in that order, neighbours merged.

        Two engines with different block numbers get lists of different lengths for the same tokens, but of the same
        bytes in the same order.

        :raises IndexError: a layer or a block is outside the cache.
        """
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self.num_blocks):
            raise IndexError(f"blocks {min(block_ids)}…{max(block_ids)} are outside a cache of {self.num_blocks}")
        runs = coalesce((block * self.block_nbytes, self.block_nbytes) for block in block_ids)
        spans: list[tuple[int, int]] = []
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise IndexError(f"layer {layer} is outside a cache of {self.num_layers}")
            spans += [(layer * self.layer_nbytes + offset, length) for offset, length in runs]
        return coalesce(spans)

    def facts(self) -> dict[str, Any]:
        """What a peer must know before it reads or writes here; JSON-able."""
        return {
            "num_layers": self.num_layers,
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": name_of(self.dtype),
        }

    def check(self, facts: Mapping[str, Any]) -> None:
        """:raises LayoutMismatch: a peer's `facts` describe blocks that are not byte for byte like ours."""
        ours = self.facts()
        wrong = [key for key in ours if key != "num_blocks" and facts.get(key) != ours[key]]
        if wrong:
            told = ", ".join(f"{key} is {facts.get(key)!r} there and {ours[key]!r} here" for key in wrong)
            raise LayoutMismatch(
                f"the peer's KV cache differs: {told}; serve the same model, dtype and block size on both"
            )


def coalesce(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge each span that begins where the one before it ends; order is kept."""
    merged: list[tuple[int, int]] = []
    for offset, length in spans:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged


class KVCache:
    """The tensors of a cache, on a transfer's arena or on memory of their own.

    `layers[i]` is layer i as `[2 * blocks, block_size, kv_heads, head_dim]`: row `2b` holds block b's keys, row
    `2b + 1` its values. `rows[i]` is the same memory by token, `[2 * blocks * block_size, kv_heads, head_dim]`;
    see `key_row`. Memory of its own has one block more than the layout: `scratch_block`, which holds no sequence.
    """

    def __init__(
        self, layout: KVLayout, buffer: memoryview | None = None, device: str = "cpu", apart: bool = False
    ) -> None:
        """`buffer` is the arena that transfers read and write. A cache on another device than the host, or kept
        `apart`, is mirrored there: `stage` and `load` copy between the two.
        """
        self.layout = layout
        self.scratch_block: int | None = None
        self._mirror: Mirror | None = None
        host = None if buffer is None else self._on(layout, buffer)
        if host is not None and torch.device(device).type == "cpu" and not apart:
            self.pool = host
        else:
            self.scratch_block = layout.num_blocks
            shape = (layout.num_layers, layout.num_blocks + 1, 2, *layout.half_shape)
            self.pool = torch.zeros(shape, dtype=layout.dtype, device=device)
            self._mirror = None if host is None else Mirror(self.pool, host)
        self.layers = list(self.pool.flatten(1, 2).unbind(0))
        self.rows = [layer.view(-1, layout.num_kv_heads, layout.head_dim) for layer in self.layers]

    @staticmethod
    def _on(layout: KVLayout, buffer: memoryview) -> torch.Tensor:
        """One tensor over everything, `[layers, blocks, 2, …]`, for copies of whole blocks."""
        count = layout.nbytes // layout.dtype.itemsize
        if buffer.nbytes < layout.nbytes:
            raise ValueError(f"the arena has {buffer.nbytes} bytes, the KV cache needs {layout.nbytes}")
        whole = torch.frombuffer(buffer, dtype=layout.dtype, count=count)
        return whole.view(layout.num_layers, layout.num_blocks, 2, *layout.half_shape)

    def stage(self, layers: range, blocks: Sequence[int]) -> Ready | None:
        """Have the arena hold what is in these blocks now, soon: a sender waits for what is returned, if anything."""
        return self._mirror.stage(layers, coalesce((block, 1) for block in blocks)) if self._mirror else None

    def load(self, blocks: Sequence[int]) -> None:
        """Let the model see what a transfer has brought into the arena."""
        if self._mirror:
            self._mirror.load(coalesce((block, 1) for block in blocks))

    def key_row(self, block: int, offset: int) -> int:
        """Where the keys of the token at `offset` in `block` lie in `rows`; its values lie `block_size` rows later."""
        return 2 * block * self.layout.block_size + offset

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers: what a fork does with the block that it will write to."""
        self.pool[:, target] = self.pool[:, source]

    def save(self, blocks: Sequence[int]) -> torch.Tensor:
        """A host copy of whole blocks, `[layers, len(blocks), 2, …]`, for `restore` into any blocks later."""
        return self.pool[:, list(blocks)].cpu()

    def restore(self, saved: torch.Tensor, blocks: Sequence[int]) -> None:
        """Put back what `save` returned; `blocks` are as many as were saved, in the same order."""
        if saved.shape[1] != len(blocks):
            raise ValueError(f"{saved.shape[1]} blocks were saved, {len(blocks)} are given to restore them into")
        self.pool[:, list(blocks)] = saved.to(self.pool.device)

    def __repr__(self) -> str:
        return (
            f"<KVCache {self.layout.num_layers} layers × {self.layout.num_blocks} blocks, {self.layout.nbytes} bytes>"
        )
