from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engines.ec_connector.shelf import Shelf
from engines.transfer.liveness import machine, started

KEY = "ab" * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_comes_back_until_it_is_discarded(tmp_path: Path, dtype: torch.dtype) -> None:
    shelf = Shelf.make(tmp_path)
    embedding = torch.randn(6, 8).to(dtype).T  # no tensor that lies in memory as its file does
    shelf.put(KEY, embedding)
    assert torch.equal(shelf.get(KEY), embedding)
    assert shelf.path(KEY) == shelf.folder / KEY / "encoder_cache.safetensors"
    shelf.discard(KEY)
    shelf.discard(KEY)
    assert list(shelf.folder.iterdir()) == []


def test_only_this_user_sees_it_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    shelf = Shelf.make(tmp_path)
    assert shelf.folder.stat().st_mode & 0o777 == 0o700
    shelf.put(KEY, torch.zeros(2, 2))
    shelf.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"])
def test_only_hashes_are_keys(tmp_path: Path, key: str) -> None:
    shelf = Shelf.make(tmp_path)
    for call in (shelf.path, shelf.get, shelf.discard, lambda key: shelf.put(key, torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="64 lowercase hex"):
            call(key)


def test_a_new_shelf_sweeps_away_those_of_dead_processes_alone(tmp_path: Path) -> None:
    def folder(machine: str, pid: int, begun: int | None) -> Path:
        path = tmp_path / f"triptych-shelf-{machine}-{pid}-{begun}-{'0' * 16}"
        (path / KEY).mkdir(parents=True)
        return path

    mine = folder(machine(), os.getpid(), started(os.getpid()))
    reused = folder(machine(), os.getpid(), 1)
    elsewhere = folder("f" * 16, os.getpid(), 1)
    foreign = tmp_path / "triptych-shelf-of-somebody"
    foreign.mkdir()
    shelf = Shelf.make(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, foreign, shelf.folder}
    assert not reused.exists()
