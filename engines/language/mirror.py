"""Host memory beside a KV cache that lies on another device. Transports read and write there; blocks are copied between
the two on streams of their own, beside what the model computes. It moves nothing between engines.

    model thread     ▸ layers 0–3 ▸ stage ▸ layers 4–7 ▸ stage ▸ …          load ▸ decode
    copying out                     └▸ 0–3 to the mirror └▸ 4–7 …           │
    sender's thread                     waits ▸ sends 0–3    waits ▸ …      │
    copying in                                                              └▸ all layers, from the mirror
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

Ready = Callable[[], None]
"""Returns when bytes that are being copied are there. From any thread, any number of times."""

Moves = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(target, source), each one run of bytes."""


class Copied(Protocol):
    """Copies that were queued."""

    def wait(self) -> None:
        """Until they are done. From any thread."""

    def join(self) -> None:
        """What this thread gives the device from now on runs after them."""


class Lane(Protocol):
    """One direction between a device and the host. Model thread only."""

    def copy(self, moves: Moves) -> Copied:
        """Queue copies behind what this thread has given the device so far, and behind this lane's earlier ones."""


class Done:
    """Copies that are over already."""

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class Direct:
    """The lane of a cache that lies in host memory too: it copies at once."""

    def copy(self, moves: Moves) -> Copied:
        for target, source in moves:
            target.copy_(source)
        return Done()


class SideStream:
    """The lane of a CUDA device: a stream of its own, whose copies overlap with the model where the host is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, moves: Moves) -> Copied:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in moves:
                target.copy_(source, non_blocking=True)
        # blocking: a sender's thread that waits sleeps, and leaves its core to the model thread
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return Recorded(self._stream.record_event(event), self._device)


class Recorded:
    """Copies up to an event of their stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        self._event.synchronize()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


def lane_of(device: torch.device) -> Lane:
    return SideStream(device) if device.type == "cuda" else Direct()


class Mirror:
    """`pool` is the cache and `host` its mirror, both `[layers, blocks, …]`; the cache may have more blocks.

    `runs` are (first block, count); each is one copy per layer.
    """

    def __init__(self, pool: torch.Tensor, host: torch.Tensor) -> None:
        self._pool, self._host = pool, host
        self._out, self._in = lane_of(pool.device), lane_of(pool.device)

    def stage(self, layers: range, runs: Sequence[tuple[int, int]]) -> Ready:
        """Begin to copy what these layers hold in these blocks by now to the mirror."""
        return self._out.copy(moves(self._host, self._pool, layers, runs)).wait

    def load(self, runs: Sequence[tuple[int, int]]) -> None:
        """Copy all layers of these blocks from the mirror, before anything that is computed from now on."""
        self._in.copy(moves(self._pool, self._host, range(len(self._pool)), runs)).join()


def moves(target: torch.Tensor, source: torch.Tensor, layers: range, runs: Sequence[tuple[int, int]]) -> Moves:
    for layer in layers:
        for first, count in runs:
            part = slice(first, first + count)
            yield target[layer, part], source[layer, part]
