from math import isnan, nan

import pytest

from bench.simulator.results import COLUMNS, Results


def row(**values: float) -> tuple[float, ...]:
    return tuple(values.get(name, 0.0) for name in COLUMNS)


def test_means_are_of_what_was_served_and_has_the_number() -> None:
    results = Results()
    results.add("E-PD", row(ok=1.0, ttft=1.0, tpot=nan, e2e=2.0))
    results.add("E-PD", row(ok=1.0, ttft=3.0, tpot=0.5, e2e=4.0, arrival=1.0))
    results.add("", row(ok=0.0, ttft=nan, tpot=nan, e2e=100.0))
    assert results.mean("ttft") == 2.0
    assert results.mean("tpot") == 0.5
    assert results.percentile("e2e", 50) == 3.0
    assert list(results["e2e"]) == [2.0, 4.0, 100.0]
    assert results.share("E-PD") == pytest.approx(2 / 3)
    assert results.throughput() == pytest.approx(2 / 100)


def test_without_requests_there_is_nothing_to_tell() -> None:
    results = Results()
    assert isnan(results.mean("ttft"))
    assert results.throughput() == results.share("E-PD") == 0.0
