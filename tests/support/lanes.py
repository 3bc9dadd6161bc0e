"""A lane between a cache and its mirror that copies as late as it may: who does not wait, reads what was there before.

Copies end in order, as those of a stream do.
"""

from __future__ import annotations

import threading

import torch

from engines.language.mirror import Copied, Moves


class Late:
    def __init__(self, _device: torch.device) -> None:
        self._queue: list[LateCopy] = []
        self._lock = threading.Lock()

    def copy(self, moves: Moves) -> Copied:
        copy = LateCopy(self, moves)
        self._queue.append(copy)
        return copy

    def end(self, copy: LateCopy) -> None:
        with self._lock:
            while copy in self._queue:
                for target, source in self._queue.pop(0).moves:
                    target.copy_(source)


class LateCopy:
    def __init__(self, lane: Late, moves: Moves) -> None:
        self._lane, self.moves = lane, moves

    def wait(self) -> None:
        self._lane.end(self)

    join = wait
