"""Several ranks as threads of one process: the real group, without the processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from engines.language.parallel.group import Processes

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[Processes], T], timeout: float = 30.0) -> list[T]:
    """What `work` returns on each rank, in their order."""

    def run(rank: int) -> T:
        group = Processes(rank, size, timeout)
        group.connect(meeting, torch.device("cpu"))
        with torch.inference_mode():
            return work(group)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(size) as pool:
        meeting = Path(folder) / "meeting"
        return list(pool.map(run, range(size)))
