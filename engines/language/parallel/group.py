"""Adds and collects tensors over the ranks of one engine, by torch's own process groups: gloo on the CPU, NCCL on CUDA.

Every wait ends: a rank that is dead or does not come makes the others raise RuntimeError, at the latest after the
group's timeout, and the group is of no use from then on.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"  # all ranks are processes of one machine


class Group(Protocol):
    """Every rank calls the same methods in the same order, with tensors of one shape and dtype."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each; `part` may be overwritten with it."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The ranks' `[n, width]` side by side, `[n, size * width]`."""

    def spread(self, whole: torch.Tensor) -> None:
        """Make `whole`, which is contiguous, what it is on rank 0."""


class Alone:
    """The group of a model that is not cut."""

    rank = 0
    size = 1

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def spread(self, whole: torch.Tensor) -> None:
        pass


class Processes:
    """A rank's way to the others. `connect` before the first use; `timeout` in seconds."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None  # torch's backends have no common type that it would export
        self._sums_itself = False

    def connect(self, meeting: Path, device: torch.device) -> None:
        """Meet the others, who call this with the same file, which does not exist before. Raises RuntimeError."""
        store = dist.FileStore(str(meeting), self.size)  # type: ignore[attr-defined]
        store.set_timeout(self._timeout)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._group = nccl(store, self.rank, self.size, self._timeout)
            self._sums_itself = True
        else:
            self._group = gloo(store, self.rank, self.size, self._timeout)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        if self._sums_itself:
            self._group.allreduce([part]).wait()
            return part
        # gloo's own sum adds an element's parts in an order that follows from where in the tensor it lies: a token's
        # numbers would depend on its batch.
        first, *others = self._collect(part)
        for other in others:
            first += other
        return first

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._collect(part), -1)

    def spread(self, whole: torch.Tensor) -> None:
        self._group.broadcast([whole], dist.BroadcastOptions()).wait()  # from rank 0, unless they say otherwise

    def abort(self) -> None:
        """Have whoever waits for another rank raise now. From any thread, in any state."""
        if self._group is not None:
            self._group.abort()

    def _collect(self, part: torch.Tensor) -> list[torch.Tensor]:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._group.allgather([parts], [part]).wait()
        return parts


def gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
