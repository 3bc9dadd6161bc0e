"""Curves against what was told: rates, means, quantiles, over workers, over a whole round of rows."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.record import Record
from proxy.telemetry.history import SPAN_S, SPANS, WINDOW, Curves, History, alone, size

NOW = 1e6  # a machine that has been up for days; the beginning of a span
WINDOW_S = SPAN_S * WINDOW


def told(history: History, at: float, status: int = 200, seconds: float = 0.5, **timings: float) -> None:
    """A stream of two items and nine tokens has ended."""
    first = at - seconds + timings.get("ttft", 0.0)
    record = Record(stream=True, path="E-P-D", items=2, began=at - seconds, first=first, ended=at, output_tokens=9)
    record.status, record.timings = status, timings
    history.ended(record)


def last(history: History, now: float) -> dict[str, float]:
    return {name: float(column[-1]) for name, column in history.curves(now).columns.items()}


def test_a_point_tells_rates_and_means_of_the_spans_before_it() -> None:
    history = alone()
    told(history, NOW, encode=0.1, prefill=0.2, ttft=0.4, seconds=1.2)
    told(history, NOW + 1, encode=0.3, ttft=0.4, seconds=2.0)
    told(history, NOW + 1, prefill=0.4)
    for status in (499, 400, 429, 500, 502, 503):
        told(history, NOW, status)
    history.ended(Record(path="PD", ended=NOW, began=NOW - 0.1, status=200, timings={"ttft": 0.1}, output_tokens=5))
    found = last(history, NOW + SPAN_S)
    rates = {name: found[name] * WINDOW_S for name in ("served", "left", "refused", "failed", "items", "tokens")}
    assert rates == {"served": 4, "left": 1, "refused": 2, "failed": 3, "items": 4, "tokens": 23}
    assert (found["E-P-D"] * WINDOW_S, found["PD"] * WINDOW_S, found["P-D"]) == (9, 1, 0)
    assert (found["encode"], found["prefill"]) == pytest.approx((0.2, 0.3))
    assert found["token"] == pytest.approx((0.8 + 1.6) / 16), "what is not streamed tells of no pace"
    assert found["ttft_p50"] == pytest.approx(0.4, rel=0.1)
    assert found["e2e_p95"] == pytest.approx(2.0, rel=0.1)


def test_the_present_span_is_not_told_of_before_it_is_over() -> None:
    history = alone()
    told(history, NOW)
    assert last(history, NOW + SPAN_S - 0.01)["served"] == 0
    assert last(history, NOW + SPAN_S)["served"] > 0
    assert last(history, NOW + WINDOW_S)["served"] > 0
    assert last(history, NOW + WINDOW_S + SPAN_S)["served"] == 0


def test_where_nothing_ended_there_is_no_time_to_tell() -> None:
    found = last(alone(), NOW)
    assert {name for name, value in found.items() if isnan(value)} == {
        *("encode", "prefill", "token", "ttft_p50", "ttft_p95", "ttft_p99", "e2e_p50", "e2e_p95")
    }


def test_a_curve_is_as_long_as_asked_and_ends_with_the_last_whole_span() -> None:
    history = alone()
    told(history, NOW)
    found = history.curves(NOW + 3 * SPAN_S, 10)
    assert found.last == NOW / SPAN_S + 2
    assert [round(value * WINDOW_S) for value in found.columns["served"]] == [0] * 7 + [1] * 3


def test_rows_are_written_anew_in_each_round() -> None:
    history = alone()
    for number in range(3 * SPANS):
        told(history, NOW + number * SPAN_S)
    now = NOW + 3 * SPANS * SPAN_S
    served = history.curves(now).columns["served"] * WINDOW_S
    assert served == pytest.approx(np.full(SPANS - WINDOW, WINDOW))
    assert not history.curves(now + 2 * SPANS * SPAN_S).columns["served"].any(), "an old round tells nothing"


def test_any_worker_tells_of_all_and_a_successor_goes_on() -> None:
    memory = bytearray(size(3))
    for worker in (0, 1, 1, 2):
        told(History(memory, 3, worker), NOW, ttft=0.1)
    told(History(memory, 3, 2), NOW + SPAN_S, ttft=0.1)
    for worker in range(3):
        assert last(History(memory, 3, worker), NOW + 2 * SPAN_S)["served"] * WINDOW_S == pytest.approx(5)


times = st.floats(1e-6, 1e4)


def quantile(curves: Curves, name: str) -> float:
    return float(curves.columns[name][-1])


@given(st.lists(times, min_size=1, max_size=50))
def test_a_quantile_is_in_the_bucket_of_the_true_one(seconds: list[float]) -> None:
    history = alone()
    for took in seconds:
        told(history, NOW, seconds=took, ttft=took)
    curves = history.curves(NOW + SPAN_S)
    for share in (50, 95):
        true = sorted(seconds)[int(np.ceil(share / 100 * len(seconds))) - 1]
        for name in (f"ttft_p{share}", f"e2e_p{share}"):
            found = quantile(curves, name)
            if true < 0.9e-3:
                assert 0 < found < 1.1e-3
            elif true < 250:
                assert true / 2**0.26 < found < true * 2**0.26
            else:
                assert found > 200, "above the last bucket there is no knowing"
