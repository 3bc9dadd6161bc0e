"""Speeds are learnt from what legs took, whatever single legs do, and mixed hardware gets its share of the work."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.rates import Rates

PRIOR = 1e-5
SPEEDS = st.floats(1e-7, 1e-2)


def learn(rates: Rates, url: str, rate: float, legs: int, work: int = 1000, ahead: int = 0) -> None:
    for _ in range(legs):
        rates.observe(url, work, ahead, rate * (work + ahead))


def test_the_prior_holds_until_something_is_known_and_then_the_typical_rate_for_strangers() -> None:
    rates = Rates(PRIOR)
    assert rates.seconds("a") == rates.typical == PRIOR
    for url, rate in {"a": 1e-6, "b": 2e-6, "c": 8e-6}.items():
        learn(rates, url, rate, 15)
    assert rates.seconds("stranger") == rates.seconds("b") == pytest.approx(2e-6)
    assert rates.shown("b") == {"seconds_per_token": rates.seconds("b"), "observations": 15}
    assert rates.shown("stranger") == {"seconds_per_token": rates.seconds("b"), "observations": 0}


@given(SPEEDS, st.integers(0, 10**7))
def test_three_legs_are_enough_to_know_a_newcomer_whatever_was_ahead_of_them(rate: float, ahead: int) -> None:
    rates = Rates(PRIOR)
    learn(rates, "a", rate, 3, ahead=ahead)
    assert rates.seconds("a") == pytest.approx(rate, rel=0.011)


@given(SPEEDS, st.sampled_from((0.01, 100.0)), st.integers(0, 20))
def test_one_leg_of_a_hundred_times_the_length_moves_a_rate_by_little(rate: float, by: float, before: int) -> None:
    random = Random(before)
    rates = Rates(rate)
    for _ in range(before):
        learn(rates, "a", rate * random.uniform(0.9, 1.1), 1)
    known = rates.seconds("a")
    learn(rates, "a", rate * by, 1)
    assert rates.seconds("a") == pytest.approx(known, rel=0.25)


@given(SPEEDS, st.sampled_from((0.25, 4.0)), st.integers(0, 2**32))
def test_a_change_of_speed_is_learnt_within_twenty_legs(rate: float, by: float, seed: int) -> None:
    random = Random(seed)
    rates = Rates(PRIOR)
    for now in (rate, rate * by):
        for _ in range(20):
            learn(rates, "a", now * random.uniform(0.8, 1.25), 1)
        assert rates.seconds("a") == pytest.approx(now, rel=0.25)


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1e6), st.integers(1, 10**6), st.booleans()), max_size=80)
)
def test_rates_are_positive_lie_among_the_samples_and_have_a_version(
    legs: list[tuple[str, float, int, bool]],
) -> None:
    rates = Rates(PRIOR)
    samples = [PRIOR]
    for url, seconds, work, leaves in legs:
        before, version = {u: rates.seconds(u) for u in "abcd"}, rates.version
        rates.observe(url, work, 0, seconds)
        if leaves:
            rates.forget(url)
        samples += [seconds / work] if seconds else []
        found = {u: rates.seconds(u) for u in "abcd"}
        assert all(0.98 * min(samples) <= rate <= 1.02 * max(samples) for rate in found.values())
        assert all(rate > 0 for rate in found.values())
        assert rates.version != version or found == before
    assert math.isfinite(rates.typical)


def test_small_changes_are_no_news() -> None:
    rates = Rates(PRIOR)
    learn(rates, "a", 1e-6, 15)
    version = rates.version
    learn(rates, "a", 1.005e-6, 15)
    assert rates.version == version
    assert rates.seconds("a") == 1e-6
    learn(rates, "a", 1.02e-6, 15)
    assert rates.version != version
    assert rates.seconds("a") == 1.02e-6


def test_who_is_given_nothing_for_long_is_tried_again() -> None:
    rates = Rates(PRIOR)
    learn(rates, "slow", 1e-3, 15)
    learn(rates, "a", 1e-6, 100)
    assert rates.seconds("slow") == pytest.approx(1e-3)
    learn(rates, "a", 1e-6, 100)
    assert rates.seconds("slow") == pytest.approx(1e-6)
    assert rates.shown("slow")["observations"] == 0
    learn(rates, "slow", 1e-3, 3)
    assert rates.seconds("slow") == pytest.approx(1e-3)


def test_a_leaver_is_forgotten() -> None:
    rates = Rates(PRIOR)
    learn(rates, "a", 1e-6, 15)
    rates.forget("a")
    rates.forget("stranger")
    assert rates.seconds("a") == PRIOR
    assert repr(rates) == "<Rates {}>"


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    rates = Rates(PRIOR)
    rates.observe("a", 1000, 0, 0.0)
    assert rates.seconds("a") == PRIOR


class Queues:
    """Engines that serve in order, each with its own speed; what is chosen is where the leg should be done first."""

    def __init__(self, speeds: dict[str, float]) -> None:
        self.rates = Rates(PRIOR)
        self._speeds = speeds
        self._free = dict.fromkeys(speeds, 0.0)
        self._open: list[tuple[float, float, str, int, int]] = []  # end, begin, url, work, ahead
        self.done: Counter[str] = Counter()

    def arrive(self, now: float, work: int) -> float:
        """The leg's seconds in the system."""
        for leg in sorted(leg for leg in self._open if leg[0] <= now):
            self._open.remove(leg)
            end, begin, url, tokens, ahead = leg
            self.rates.observe(url, tokens, ahead, end - begin)
        pending = Counter(dict.fromkeys(self._speeds, 0))
        for _, _, url, tokens, _ in self._open:
            pending[url] += tokens
        chosen = min(self._speeds, key=lambda url: (pending[url] + work) * self.rates.seconds(url))
        end = self._free[chosen] = max(now, self._free[chosen]) + work * self._speeds[chosen]
        self._open.append((end, now, chosen, work, pending[chosen]))
        self.done[chosen] += work
        return end - now


def test_mixed_hardware_gets_work_as_it_is_fast() -> None:
    random, speeds = Random(7), {"fast": 1e-5, "half": 2e-5, "quarter": 4e-5}
    capacity = sum(1 / speed for speed in speeds.values())
    learning, knowing, blind = (Queues(speeds) for _ in range(3))
    for url, speed in speeds.items():
        learn(knowing.rates, url, speed, 15)
    blind.rates.observe = lambda *_: None  # type: ignore[method-assign]
    now, took = 0.0, {learning: 0.0, knowing: 0.0, blind: 0.0}
    for _ in range(4000):
        work = random.choice((100, 500, 2000))
        now += random.expovariate(0.7 * capacity / 867)
        for one in took:
            took[one] += one.arrive(now, work)
    assert took[learning] < 1.02 * took[knowing]
    assert took[learning] < 0.9 * took[blind]
    shares = {url: learning.done[url] / learning.done.total() * capacity * speed for url, speed in speeds.items()}
    assert all(0.5 < share < 1.5 for share in shares.values()), shares
