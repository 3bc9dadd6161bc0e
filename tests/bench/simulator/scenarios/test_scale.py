from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from bench.report import Report
from bench.simulator.scenarios import scale
from proxy.core import Role


def test_every_role_is_there_in_small_fleets_too() -> None:
    for number in (scale.SMALL, scale.INSTANCES):
        roles = Counter(machine.role for machine in scale.machines(number))
        assert roles.total() == number
        assert roles.keys() == {Role.ENCODE, Role.PREFILL, Role.DECODE}


def test_half_of_the_requests_show_an_image_at_the_pace_of_the_fleet() -> None:
    made = list(islice(scale.arrivals(100), 4000))
    assert sum(len(request.media) for _, request in made) == pytest.approx(2000, rel=0.1)
    assert len(made) / made[-1][0] == pytest.approx(100 * scale.PER_INSTANCE, rel=0.1)


@pytest.mark.parametrize("role", [Role.ENCODE, Role.PREFILL, Role.DECODE], ids=lambda role: role.label)
def test_decisions_are_timed_one_batch_after_the_other(role: Role) -> None:
    decide = scale.taking(role, 10)
    assert all(0 < decide(20) < 10 for _ in range(3))


def test_whole_plans_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BATCH", 8)
    decide = scale.drawing(10)
    assert all(0 < decide(8) < 10 for _ in range(3))


def test_a_small_run_serves_all_and_is_measured_against_the_same_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "INSTANCES", 20)
    report = Report("")
    scale.whole(report, 300)
    (row,) = report.rows
    assert row["served"] == row["requests"] == 300
    (bar,) = report.bars
    assert (bar.op, bar.limit) == ("<=", 10.0)
