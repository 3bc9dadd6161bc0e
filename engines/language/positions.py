"""M-RoPE positions: the (temporal, height, width) index of every token, from the grids alone. It reads no token ids
and runs no model.

Text counts up, the same in all three rows. An item of t × h × w merged patches starts at the next free number `p`: its
tokens have (p + t · interval, p + h, p + w) in raster order, and the text behind it goes on at p + max(h, w), even if
a video's time has come further than that:

    prompt     text  │ video of 12 steps, 2 × 4          │ text        ┊ generated
    temporal   0 1 2 │ 3 3 3 3 3 3 3 3 4 4 …  14 14 14 14 │ 7 8 9 10 11 ┊ 12 13 14
    width      0 1 2 │ 3 4 5 6 3 4 5 6 3 4 …   3  4  5  6 │ 7 8 9 10 11 ┊ 12 13 14

The numbers therefore differ from the token index by `delta` from the last item on, decoded tokens included: these go on
where the prompt's end, as `generate` of transformers has it (not behind the highest number, as its `rope_deltas` say).
Qwen2-VL, Qwen2.5-VL and Qwen3-VL agree on all this; they differ in how far apart the steps of a video are, and in how
they interleave the three rows, which is the model's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.language.sequence import Item

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions of one sequence, for every token it has or ever will have. Immutable; forks share it.

    `prefix` covers the tokens up to the end of the last item, `[3, n]`; from there on a token's position is its
    index + `delta`.
    """

    prefix: Indices
    delta: int

    @classmethod
    def build(cls, items: Sequence[Item], merge_size: int, mrope: bool = True) -> Positions:
        """Positions from the items of a prompt, in the order of their offsets; without `mrope` all rows are the index.

        :raises ValueError: an item overlaps the one before it, or its grid does not make its number of tokens.
        """
        parts: list[Indices] = []
        index, position = 0, 0  # of the next token
        for item in items:
            if item.offset < index:
                raise ValueError(f"item {item.mm_hash} begins at token {item.offset}, inside the item before it")
            gap = item.offset - index
            own = item_positions(item, merge_size)
            parts += [count_up(position, gap), own + (position + gap)]
            position += gap + max(item.grid[1], item.grid[2]) // merge_size
            index = item.offset + item.num_tokens
        if not (mrope and parts):
            return cls(np.zeros((3, 0), np.int64), 0)
        return cls(np.concatenate(parts, axis=1), position - index)

    def fill(self, out: Indices, start: int) -> None:
        """Write the positions of the tokens from `start` on into `out`, `[3, n]`; n may reach beyond the prompt."""
        stop = start + out.shape[1]
        held = self.prefix.shape[1]
        middle = min(max(held, start), stop)
        if start < middle:
            out[:, : middle - start] = self.prefix[:, start:middle]
        if middle < stop:
            out[:, middle - start :] = np.arange(middle + self.delta, stop + self.delta)

    def slice(self, start: int, stop: int) -> Indices:
        """The positions of tokens `start` to `stop`, `[3, stop - start]`."""
        out = np.empty((3, stop - start), np.int64)
        self.fill(out, start)
        return out


def count_up(start: int, count: int) -> Indices:
    return np.tile(np.arange(start, start + count, dtype=np.int64), (3, 1))


def item_positions(item: Item, merge_size: int) -> Indices:
    """The positions of one item's tokens, counted from its own start."""
    t, h, w = item.grid[0], item.grid[1] // merge_size, item.grid[2] // merge_size
    if t * h * w != item.num_tokens:
        raise ValueError(
            f"item {item.mm_hash}: grid {item.grid} makes {t * h * w} tokens, its prompt holds {item.num_tokens}"
        )
    found = np.indices((t, h, w), dtype=np.int64).reshape(3, -1)
    if item.interval != 1:
        found[0] = (found[0].astype(np.float32) * np.float32(item.interval)).astype(np.int64)  # as torch rounds
    return found
