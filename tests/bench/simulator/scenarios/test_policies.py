from __future__ import annotations

from itertools import islice

import pytest

from bench.report import Report
from bench.simulator.scenarios import policies
from bench.simulator.scenarios.policies import Run, arrivals, simulated, tell_new, tell_reuse
from proxy.balancer import POLICIES


def run(mean: float) -> Run:
    return Run(mean, 2 * mean, 0.5)


def test_the_offered_load_is_the_gpu_time_of_all_images() -> None:
    made = list(islice(arrivals(0.8, reuse=False, seed=1), 4000))
    busy = sum(policies.VISION.cost(media).gpu for _, request in made for media in request.media)
    assert busy / made[-1][0] / policies.ENCODERS == pytest.approx(0.8, rel=0.05)


def test_every_policy_is_simulated_and_ours_waits_less_than_chance() -> None:
    found = {policy: simulated(policy, 0.8, reuse=True, number=400) for policy in POLICIES}
    assert all(0 < one.mean <= one.p99 for one in found.values())
    assert found["affinity"].mean < found["random"].mean / 2
    assert found["affinity"].hits > found["random"].hits


def test_the_same_seed_gives_the_same_figures() -> None:
    assert simulated("two_choices", 0.8, True, 100, seed=3) == simulated("two_choices", 0.8, True, 100, seed=3)
    assert simulated("two_choices", 0.8, True, 100, seed=3) != simulated("two_choices", 0.8, True, 100, seed=4)


def test_nothing_is_found_twice_where_all_images_are_new() -> None:
    assert simulated("affinity", 0.5, reuse=False, number=100).hits == 0


@pytest.mark.parametrize(("other", "holds"), [(1.5, True), (1.4, False)])
def test_with_reuse_ours_is_ahead_of_the_best_other_over_all_loads(other: float, holds: bool) -> None:
    report = Report("")
    tell_reuse(
        report, {"affinity": [run(1.0), run(3.0)], "random": [run(9.0)] * 2, "round_robin": [run(2 * other)] * 2}
    )
    (bar,) = report.bars
    assert (bar.value, bar.holds) == (other, holds)
    assert "round_robin, the best other" in bar.name


@pytest.mark.parametrize(("ours", "holds"), [(1.09, True), (1.11, False)])
def test_without_reuse_ours_is_near_the_best_at_every_load(ours: float, holds: bool) -> None:
    report = Report("")
    tell_new(report, {"affinity": [run(1.0), run(2 * ours)], "random": [run(1.2), run(2.0)]})
    (bar,) = report.bars
    assert (bar.value, bar.holds) == (ours, holds)
