from __future__ import annotations

import pytest

from bench.simulator.scenarios import seed000
from bench.simulator.scenarios.seed000 import COLUMNS


def test_each_model_is_compared_on_as_many_gpus() -> None:
    for apart, colocated in zip(COLUMNS[1::2], COLUMNS[::2], strict=True):
        assert apart.model is colocated.model
        assert apart.gpus == colocated.gpus


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column.model.name} {column.name}")
def test_a_few_runs_come_near_what_was_published(column: seed000.Column) -> None:
    mean, median, spread = seed000.simulated(column, 40)
    assert mean == pytest.approx(column.e2e, rel=seed000.WITHIN)
    assert median == pytest.approx(column.median, rel=0.2)
    assert 0 < spread < mean
