from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from bench.report import Report
from bench.simulator.scenarios import decider
from bench.simulator.scenarios.decider import HEAVY, LIGHT, MIXTURE, TEXT_ONLY, WORKLOADS, Workload, arrivals, machines
from proxy.core import BOTH, Role


def test_each_mode_has_the_same_engines_but_for_who_may_encode() -> None:
    roles = {mode: [machine.role for machine in machines(mode)] for mode in decider.MODES}
    assert roles["always"] == roles["decided"] == [Role.ENCODE] * 2 + [BOTH] * 4
    assert roles["never"] == [BOTH] * 4
    inline = {mode: {m.spec.vision is not None for m in machines(mode) if m.role == BOTH} for mode in decider.MODES}
    assert inline == {"always": {False}, "never": {True}, "decided": {True}}


def test_workloads_go_from_light_to_heavy_images() -> None:
    seconds = [float(np.mean([kind.seconds() for kind in workload.kinds])) for workload in WORKLOADS[:-1]]
    assert seconds == sorted(seconds)
    assert TEXT_ONLY.seconds() == 0 < LIGHT.seconds() < HEAVY.seconds()
    assert WORKLOADS[-1] is MIXTURE


def test_a_mixture_s_requests_are_of_all_kinds_and_no_image_is_shown_twice() -> None:
    made = [request for _, request in islice(arrivals(MIXTURE, 0.5, seed=1), 400)]
    assert {len(request.media) for request in made} == {0, 1, 2, 3, 4, 5, 6}
    shown = [image.identity for request in made for image in request.media]
    assert len(set(shown)) == len(shown)
    times = [at for at, _ in islice(arrivals(MIXTURE, 0.5, seed=1), 4000)]
    assert 4000 / times[-1] == pytest.approx(decider.rate(MIXTURE, 0.5), rel=0.15)


def test_a_short_run_decides_both_ways_and_is_better_than_either() -> None:
    found = {mode: decider.simulated(MIXTURE, 0.7, mode, 500) for mode in decider.MODES}
    assert found["always"][1] == 0
    assert found["never"][1] == 1
    assert 0.1 < found["decided"][1] < 0.9
    assert found["decided"][0] < min(found["always"][0], found["never"][0])


@pytest.mark.parametrize(
    ("workload", "ours", "holds"),
    [(WORKLOADS[1], 1.02, True), (WORKLOADS[1], 1.04, False), (MIXTURE, 1.02, False), (MIXTURE, 0.99, True)],
)
def test_a_mixture_must_be_better_than_both_and_others_nearly_as_good(
    workload: Workload, ours: float, holds: bool
) -> None:
    report = Report("")
    decider.tell(report, workload, 0.5, {"always": 2.0, "never": 1.0, "decided": ours})
    assert [bar.holds for bar in report.bars] == [holds]
