from __future__ import annotations

import pytest

from bench.simulator.scenarios import seed001
from bench.simulator.scenarios.seed001 import COLUMNS, Column


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column.model.name} {column.name}")
def test_a_few_runs_come_near_what_was_published(column: Column) -> None:
    ttft, tpot = seed001.simulated(column, column.rate, 12)
    assert ttft == pytest.approx(column.ttft, rel=seed001.WITHIN)
    assert tpot == pytest.approx(column.tpot, rel=seed001.WITHIN)


def test_the_highest_rate_is_the_last_that_keeps_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    column = COLUMNS[0]
    slow = 0.9 * column.rate

    def simulated(column: Column, rate: float, runs: int) -> tuple[float, float]:
        return (3.9 if rate <= slow else 4.1), 0.05

    monkeypatch.setattr(seed001, "simulated", simulated)
    assert seed001.highest_rate(column, 1) == pytest.approx(slow, rel=0.01)
