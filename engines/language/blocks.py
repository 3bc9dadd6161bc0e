"""Which KV block belongs to whom: a reference-counted free list. It holds numbers, never tensors, and never waits.

A block is free, or it has as many references as there are tables, spares and pins that name it. The lowest free numbers
go first, so that a sequence's blocks tend to be neighbours and a transfer of them coalesces into few copies.

A whole block may be given a name that says what is in it (see `prefix`). It keeps that when it becomes free, and can be
shared by whoever asks for the name, until its turn comes to be overwritten: after all that are free and have no name,
the longest unused first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was allocated."""


class BlockAllocator:
    """`num_blocks` blocks of `block_size` tokens. Not thread-safe: one thread owns it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap
        self._references = [0] * num_blocks
        self._names: dict[int, bytes] = {}  # by block
        self._named: dict[bytes, int] = {}  # by name
        self._idle: dict[int, None] = {}  # free blocks with a name, the longest unused first

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold the KV of `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises OutOfBlocks."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} of {self.num_blocks} free")
        while len(self._free) < count:
            self._forget()
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> list[int]:
        """One more reference to each of these blocks, which are in use or have a name. Returns them as a new list."""
        blocks = list(blocks)
        for block in blocks:
            if not self._references[block] and block not in self._idle:
                raise RuntimeError(f"block {block} is free and cannot be shared")
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each; a block with none left is free again.

        Of blocks with names the last is overwritten first: a chain is of use only from its beginning.
        """
        for block in reversed(blocks):
            if not self._references[block]:
                raise RuntimeError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._names:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._free, block)

    # -- blocks with names ------------------------------------------------------------------------------------------

    def name(self, block: int, name: bytes) -> None:
        """Say what is in a block in use, which nobody writes to any more. Nothing if another one has that name."""
        if block not in self._names and name not in self._named:
            self._names[block] = name
            self._named[name] = block

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks with these names, up to the first that nobody has. They are not taken: see `share`."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks count as free."""
        return sum(block in self._idle for block in blocks)

    def _forget(self) -> None:
        block = next(iter(self._idle))
        del self._idle[block], self._named[self._names.pop(block)]
        heapq.heappush(self._free, block)

    # -- the invariant ----------------------------------------------------------------------------------------------

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
        if used + self.num_free != self.num_blocks or len({*self._free, *self._idle}) != self.num_free:
            raise RuntimeError(f"{used} blocks used + {self.num_free} free is not {self.num_blocks}")
        if {name: block for block, name in self._names.items()} != self._named or self._idle.keys() - self._names:
            raise RuntimeError(f"{len(self._names)} blocks have names, {len(self._named)} names have blocks")

    def __repr__(self) -> str:
        return f"<BlockAllocator {self.num_free}/{self.num_blocks} free, {self.block_size} tokens each>"
