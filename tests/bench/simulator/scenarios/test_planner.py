from __future__ import annotations

import argparse

import pytest

from bench.report import Report
from bench.simulator.scenarios import planner
from bench.simulator.scenarios.planner import WORKLOADS, Search, Split, Workload, advised, bound, distance, splits


def test_all_splits_have_all_engines_and_none_lacks_a_role() -> None:
    assert len(splits()) == len(set(splits())) == 21
    assert {sum(split) for split in splits()} == {planner.ENGINES}
    assert min(min(split) for split in splits()) == 1


def test_distance_is_of_the_role_that_differs_the_most() -> None:
    assert distance((3, 2, 3), (3, 2, 3)) == 0
    assert distance((3, 2, 3), (2, 3, 3)) == 1
    assert distance((1, 2, 5), (3, 2, 3)) == 2


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_the_stage_that_takes_longest_is_advised_most_engines(workload: Workload) -> None:
    works, split = planner.works(workload), advised(workload)
    assert sum(split) == planner.ENGINES
    assert split[works.index(max(works))] == max(split)


def test_workloads_want_different_splits() -> None:
    assert len({advised(workload) for workload in WORKLOADS}) == len(WORKLOADS)


def test_the_highest_rate_is_carried_and_a_higher_one_is_not() -> None:
    workload = WORKLOADS[1]
    split = advised(workload)
    search = Search(workload, 300)
    rate = search.highest(split, 0.0)
    assert 0.3 * bound(workload, split) < rate <= bound(workload, split)
    assert search.carries(split, rate)
    assert not search.carries(split, 1.3 * bound(workload, split))
    assert search.highest(split, 1.01 * bound(workload, split)) == 0.0


@pytest.mark.parametrize(("better", "engines"), [((1, 4, 3), 1.0), ((1, 3, 4), 2.0)])
def test_a_better_split_is_found_wherever_it_is(better: Split, engines: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(Search):
        def __init__(self, workload: Workload, number: int) -> None:
            assert number == 7

        def highest(self, split: Split, least: float) -> float:
            rate = 9.0 if split == better else 5.0
            return rate if rate > least else 0.0

    monkeypatch.setattr(planner, "Search", Known)
    monkeypatch.setattr(planner, "WORKLOADS", WORKLOADS[1:2])
    report = Report("")
    planner.run(report, argparse.Namespace(requests=7))
    assert report.rows == [
        {
            "workload": "long prompts",
            "advised": "1:5:2",
            "best": ":".join(map(str, better)),
            "advised_rps": 5.0,
            "best_rps": 9.0,
        }
    ]
    (bar,) = report.bars
    assert (bar.value, bar.holds) == (engines, engines <= 1)
