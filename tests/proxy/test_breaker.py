"""A circuit's whole life on a clock that the test holds."""

from __future__ import annotations

import pytest

from proxy.breaker import Breakers, Circuit, Thresholds
from proxy.retry import Blame

URL = "http://a"


@pytest.fixture
def breakers() -> Breakers:
    return Breakers(Thresholds(failures=3, delay=10.0))


def fail(breakers: Breakers, times: int, now: float = 0.0) -> list[bool]:
    return [breakers.permit(URL).failed(Blame.FAILURE, now) for _ in range(times)]


def test_failures_in_a_row_open_it_for_a_time(breakers: Breakers) -> None:
    assert fail(breakers, 2) == [False, False]
    breakers.permit(URL).succeeded()
    assert fail(breakers, 3) == [False, False, True], "only those in a row count"
    assert (breakers.circuit(URL, 9.9), breakers.allows(URL, 9.9)) == (Circuit.OPEN, False)
    assert breakers.wait(URL, 4.0) == 6.0
    assert (breakers.circuit(URL, 10.0), breakers.allows(URL, 10.0)) == (Circuit.HALF_OPEN, True)
    assert breakers.allows("http://b", 0.0), "others are not concerned"


def test_half_open_lets_one_try_and_its_success_closes_it(breakers: Breakers) -> None:
    fail(breakers, 3)
    trial = breakers.permit(URL)
    assert not breakers.allows(URL, 11.0), "one is trying"
    trial.succeeded()
    assert breakers.circuit(URL, 11.0) is Circuit.CLOSED and breakers.allows(URL, 11.0)
    assert fail(breakers, 2, 11.0) == [False, False], "it counts from nothing again"


def test_a_failed_trial_opens_it_for_longer_up_to_a_limit(breakers: Breakers) -> None:
    fail(breakers, 3)
    waits, now = [], 10.0
    for _ in range(6):
        assert breakers.permit(URL).failed(Blame.FAILURE, now)
        waits.append(breakers.wait(URL, now))
        now += waits[-1]
    assert waits == [20.0, 40.0, 80.0, 80.0, 80.0, 80.0]


@pytest.mark.parametrize("blame", [None, Blame.NONE], ids=["closed", "not-to-blame"])
def test_a_trial_without_verdict_lets_another_try(breakers: Breakers, blame: Blame | None) -> None:
    fail(breakers, 3)
    trial = breakers.permit(URL)
    if blame is not None:
        assert not trial.failed(blame, 11.0)
    trial.close()
    assert breakers.circuit(URL, 11.0) is Circuit.HALF_OPEN and breakers.allows(URL, 11.0)


def test_legs_begun_before_it_opened_change_nothing_but_by_success(breakers: Breakers) -> None:
    old = [breakers.permit(URL) for _ in range(2)]
    fail(breakers, 3)
    assert not old[0].failed(Blame.FAILURE, 5.0) and breakers.wait(URL, 5.0) == 5.0
    old[1].succeeded()
    assert breakers.allows(URL, 5.0)


def test_a_busy_one_is_avoided_as_long_as_it_asks_and_not_blamed(breakers: Breakers) -> None:
    breakers.permit(URL).failed(Blame.AVOID, 1.0, 4.0)
    assert (breakers.allows(URL, 4.9), breakers.allows(URL, 5.0)) == (False, True)
    assert breakers.circuit(URL, 2.0) is Circuit.CLOSED
    breakers.permit(URL).failed(Blame.AVOID, 6.0, None)
    assert breakers.allows(URL, 6.0), "it named no time"
    breakers.permit(URL).failed(Blame.AVOID, 6.0, 1e9)
    assert breakers.wait(URL, 6.0) == 60.0, "nobody is avoided for ever"


def test_a_permit_ends_once(breakers: Breakers) -> None:
    permit = breakers.permit(URL)
    permit.succeeded()
    assert [permit.failed(Blame.FAILURE, 0.0) for _ in range(9)] == [False] * 9
    assert breakers.circuit(URL, 0.0) is Circuit.CLOSED


def test_a_new_process_begins_with_a_closed_circuit(breakers: Breakers) -> None:
    old = breakers.permit(URL)
    fail(breakers, 3)
    breakers.forget(URL)
    old.close()
    assert breakers.allows(URL, 0.0) and breakers.circuit(URL, 0.0) is Circuit.CLOSED
