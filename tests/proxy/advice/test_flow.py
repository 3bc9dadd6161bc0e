"""Fading sums against their definition: over workers, over hours, and after a worker that died as it wrote."""

from __future__ import annotations

from math import exp, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.advice.flow import FADING, Flow, Sum, alone, size

NOW = 1e6  # a machine that has been up for days

Event = tuple[float, int, Sum, float]  # seconds after the one before, worker, what, how much

events = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(0, 10), st.floats(0, 30 * FADING), st.floats(99 * FADING, 300 * FADING)),
        st.integers(0, 2),
        st.sampled_from(Sum),
        st.floats(0, 1e12),
    ),
    max_size=30,
)


@given(events, st.floats(0, 5 * FADING))
def test_a_sum_is_that_of_all_workers_amounts_by_their_age(told: list[Event], after: float) -> None:
    memory = bytearray(size(3))
    flows = [Flow(memory, 3, worker) for worker in range(3)]
    now, expected = NOW, [[] for _ in Sum]
    for gap, worker, what, amount in told:
        now += gap
        flows[worker].add(now, [(what, amount)])
        expected[what].append((now, amount))
    now += after
    for what in Sum:
        naive = sum(amount * exp((at - now) / FADING) for at, amount in expected[what])
        for flow in flows:
            assert isclose(flow.sums(now)[what], naive, rel_tol=1e-9, abs_tol=1e-6)


def test_a_steady_stream_has_its_rate_from_the_first_minute_on() -> None:
    flow = alone()
    for second in range(600):
        flow.add(NOW + second, [(Sum.REQUESTS, 3.0)])
        if second > 30:
            rate = flow.sums(NOW + second)[Sum.REQUESTS] / flow.span(NOW + second)
            assert rate == pytest.approx(3.0, rel=0.05)


def test_after_a_change_a_few_minutes_tell_the_new_rate() -> None:
    flow = alone()
    for second in range(1200):
        flow.add(NOW + second, [(Sum.PROMPT, 100.0 if second < 600 else 1000.0)])
    now = NOW + 1200
    assert flow.sums(now)[Sum.PROMPT] / flow.span(now) == pytest.approx(1000, rel=0.02)
    assert alone().sums(now) == [0.0] * len(Sum) and alone().span(now) == 0


def test_who_takes_a_dead_workers_place_counts_on() -> None:
    memory = bytearray(size(2))
    first, other = Flow(memory, 2, 0), Flow(memory, 2, 1)
    first.add(NOW, [(Sum.OUTPUT, 5.0)])
    successor = Flow(memory, 2, 0)
    successor.add(NOW, [(Sum.OUTPUT, 2.0)])
    assert other.sums(NOW)[Sum.OUTPUT] == 7.0


def test_of_a_row_that_was_left_half_written_nothing_is_believed() -> None:
    memory, now = bytearray(size(2)), 10.0  # just booted: the row's age would not make it forgotten
    first, other = Flow(memory, 2, 0), Flow(memory, 2, 1)
    first.add(now, [(Sum.OUTPUT, 5.0)])
    other.add(now, [(Sum.OUTPUT, 1.0)])
    memoryview(memory).cast("d")[1] = 0.0  # it was killed between the first and the last number
    assert other.sums(now)[Sum.OUTPUT] == 1.0
    Flow(memory, 2, 0).add(now + 1, [(Sum.OUTPUT, 3.0)])
    assert other.sums(now + 1)[Sum.OUTPUT] == pytest.approx(3.0 + exp(-1 / FADING))
