from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.ec_connector.shelf import Shelf
from engines.ec_connector.worker_side import WorkerSide

CAT, DOG = "ca" * 32, "d0" * 32


def test_embeddings_are_loaded_in_the_models_dtype_and_those_that_are_there_are_left_alone(
    tmp_path: Path,
) -> None:
    Shelf(tmp_path).put(CAT, torch.full((2, 3), 1.5))
    mine = torch.zeros(2, 3)
    cache = {DOG: mine}
    WorkerSide("cpu", torch.bfloat16, saves=False).load(cache, str(tmp_path), [CAT, DOG])
    assert cache[CAT].dtype is torch.bfloat16
    assert cache[CAT].equal(torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    assert cache[DOG] is mine


def test_what_the_cache_holds_is_saved_as_it_is(tmp_path: Path) -> None:
    WorkerSide("cpu", torch.float32, saves=True).save({CAT: torch.ones(2, 3)}, str(tmp_path), [CAT, DOG])
    assert Shelf(tmp_path).get(CAT).equal(torch.ones(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == [CAT]


def test_a_worker_that_does_not_save_writes_nothing(tmp_path: Path) -> None:
    WorkerSide("cpu", torch.float32, saves=False).save({CAT: torch.ones(2, 3)}, str(tmp_path), [CAT])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_logged_and_never_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CAT).touch()
    cache = {CAT: torch.ones(2, 3), "../x": torch.ones(2, 3), DOG: torch.ones(2, 3)}
    WorkerSide("cpu", torch.float32, saves=True).save(cache, str(tmp_path), [CAT, "../x", DOG])
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"cannot save the embedding {CAT}",
        "cannot save the embedding ../x",
    ]
    assert Shelf(tmp_path).get(DOG).equal(torch.ones(2, 3))
