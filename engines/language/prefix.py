"""What the KV of a block depends on, as a name: equal names are equal KV. No blocks are kept here; `blocks` does that.

The KV of a token depends on all tokens up to it, on the embeddings in place of an item's tokens, and on nothing else:

    name(block) = hash( name(the block before) │ its tokens │ each item in it: mm_hash, rows, grid, where it begins )

An item's placeholder tokens are the same for all items of a size, so its mm_hash is what tells two images apart. Only
whole blocks have names, since a block that is not full will still be written to.
"""

from __future__ import annotations

from array import array

from blake3 import blake3

from engines.language.sequence import Sequence

_NAME_BYTES = 16


def names(seq: Sequence, count: int, block_size: int) -> list[bytes]:
    """Of the first `count` blocks of `seq`, which must be whole. They are kept in `seq.names`, each made once."""
    known = seq.names
    while len(known) < count:
        first = len(known) * block_size
        known.append(_name(seq, first, first + block_size, known[-1] if known else b""))
    return known[:count]


def _name(seq: Sequence, first: int, end: int, before: bytes) -> bytes:
    hasher = blake3(before)
    hasher.update(array("q", seq.token_ids[first:end]).tobytes())
    for item in seq.items:
        if item.offset < end and item.offset + item.num_tokens > first:
            told = f"{item.mm_hash} {item.row} {item.grid} {item.interval} {item.offset - first}"
            hasher.update(f"{told}\0".encode())
    return hasher.digest(_NAME_BYTES)
