"""Tiny checkpoints for the tests, made once per machine under `.checkpoints/` and remade when their maker changes."""

from __future__ import annotations

import fcntl
import hashlib
from functools import cache
from pathlib import Path

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".checkpoints"


@cache
def checkpoint(family: str, seed: int = 0) -> Path:
    """The folder of a tiny checkpoint; safe against several test processes asking at once."""
    maker = hashlib.sha256((ROOT / "engines" / "checkpoint.py").read_bytes()).hexdigest()[:12]
    folder = FOLDER / f"{family}-{seed}-{maker}"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            from engines.tiny import make

            make(family, folder, seed)
    return folder
