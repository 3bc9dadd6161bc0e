"""The folder through which embeddings pass between vLLM's scheduler process and its workers, in the storage layout.

    <parent>/triptych-shelf-<machine>-<pid>-<start time>-<random>/<key>/encoder_cache.safetensors

A process that was killed leaves its folder behind; whoever starts next removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

import safetensors.torch
import torch

from engines.dtypes import name_of
from engines.transfer.liveness import machine, started
from engines.transfer.spans import table
from engines.transfer.storage import FILE, KEY, TENSOR, save

NAME = re.compile(r"triptych-shelf-(?P<machine>[0-9a-f]{16})-(?P<pid>[0-9]+)-(?P<started>[0-9]+)-[0-9a-f]{16}")


def sweep(parent: Path) -> None:
    """Remove the shelves of this machine's dead processes."""
    for path in parent.glob("triptych-shelf-*"):
        owner = NAME.fullmatch(path.name)
        if owner is not None and owner["machine"] == machine() and started(int(owner["pid"])) != int(owner["started"]):
            shutil.rmtree(path, ignore_errors=True)


class Shelf:
    """A folder in the storage layout: one of our own, or the one that all engines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, parent: Path) -> Shelf:
        """An empty one that only this user can read. Raises OSError."""
        sweep(parent)
        pid = os.getpid()
        folder = parent / f"triptych-shelf-{machine()}-{pid}-{started(pid)}-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        return cls(folder)

    def path(self, key: str) -> Path:
        """Raises ValueError for a key that is no hash, which could lead anywhere."""
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no mm_hash: embeddings are named by 64 lowercase hex digits")
        return self.folder / key / FILE

    def put(self, key: str, embedding: torch.Tensor) -> None:
        """`embedding`: [tokens, width], on any device. Raises OSError, KeyError for a dtype that no file has."""
        dtype = name_of(embedding.dtype)
        flat = embedding.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        save(self.path(key), flat.data, table([(0, flat.nbytes)], flat.nbytes), dtype, embedding.shape)

    def get(self, key: str) -> torch.Tensor:
        """[tokens, width], in host memory."""
        found: torch.Tensor = safetensors.torch.load_file(self.path(key))[TENSOR]
        return found

    def discard(self, key: str) -> None:
        path = self.path(key)
        with contextlib.suppress(OSError):  # it is not there, or somebody puts it again
            path.unlink()
            path.parent.rmdir()

    def remove(self) -> None:
        """The whole folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
