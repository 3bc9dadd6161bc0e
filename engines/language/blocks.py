"""Which KV block belongs to whom: a reference-counted free list. It holds numbers, never tensors, and never waits.

A block is free, or it has as many references as there are tables, spares and pins that name it. The lowest free numbers
go first, so that a sequence's blocks tend to be neighbours and a transfer of them coalesces into few copies.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was allocated."""


class BlockAllocator:
    """`num_blocks` blocks of `block_size` tokens. Not thread-safe: one thread owns it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> list[int]:
        """One more reference to each of these blocks, which must be in use. Returns them as a new list."""
        blocks = list(blocks)
        for block in blocks:
            if not self._references[block]:
                raise RuntimeError(f"block {block} is free and cannot be shared")
        for block in blocks:
            self._references[block] += 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; a block with none left is free again."""
        for block in blocks:
            if not self._references[block]:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if not self._references[block]:
                heapq.heappush(self._free, block)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raise RuntimeError unless free + used = total and every reference is one of `holders`' and no other."""
        counted = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counted[block] += 1
        if counted != self._references:
            wrong = {b: (r, c) for b, (r, c) in enumerate(zip(self._references, counted, strict=True)) if r != c}
            raise RuntimeError(f"block references (counted, held): {wrong}")
        used = self.num_blocks - self._references.count(0)
        if used + len(self._free) != self.num_blocks or len(set(self._free)) != len(self._free):
            raise RuntimeError(f"{used} blocks used + {len(self._free)} free is not {self.num_blocks}")

    def __repr__(self) -> str:
        return f"<BlockAllocator {self.num_free}/{self.num_blocks} free, {self.block_size} tokens each>"
