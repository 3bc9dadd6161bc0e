"""Predicted times, against the formula written down for one instance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.foresight import DOUBT, rates_of, soonest, times
from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand
from proxy.balancer.rates import Rates
from proxy.core import Role
from tests.support.balancing import demands, pool

URLS = "abcdefghijklmnopqrst"


def naive(url: str, demand: Demand, ledger: Ledger, rates: Rates) -> float:
    pending = ledger.load(url) * rates.seconds(url)
    waiting, rate = max(demand.ready, pending), rates.seconds(url)
    whole, own = waiting + demand.work * rate, demand.held.get(url, demand.work) * rate
    done = DOUBT * whole + own if demand.at_once and url in demand.held else waiting + own
    return done + demand.transfer.get(url, 0.0)


@given(
    demands(URLS), st.dictionaries(st.sampled_from(URLS), st.integers(1, 500)), st.sampled_from([1, 2, 6, len(URLS)])
)
def test_times_are_those_of_each_instance_alone(demand: Demand, loads: dict[str, int], count: int) -> None:
    candidates, everybody, ledger, rates = pool(URLS[:count]), pool(URLS), Ledger({}), Rates(1e-3)
    for number, (url, load) in enumerate(loads.items()):
        ledger.lease(everybody.by_url[url], Role.ENCODE, load)
        rates.observe(url, load, 0, load * (number + 1) * 1e-3)
    wanted = [naive(url, demand, ledger, rates) for url in candidates]
    assert times(candidates, demand, ledger, rates).tolist() == pytest.approx(wanted)
    assert soonest(candidates, demand, ledger, rates) == pytest.approx(min(wanted))
    assert ledger.leases() == len(loads), "nothing is charged"


def test_a_large_pools_rates_are_read_again_a_few_at_a_time_until_all_are_new() -> None:
    urls = [f"h{number:03}" for number in range(100)]
    candidates, rates = pool(urls), Rates(1.0)
    assert rates_of(candidates, rates).tolist() == [1.0] * 100
    for _ in range(20):
        for url in urls:
            rates.observe(url, 1, 0, 3.0)
    assert 0 < rates_of(candidates, rates).tolist().count(3.0) < 100
    for _ in range(6):
        rates_of(candidates, rates)
    assert rates_of(candidates, rates).tolist() == [3.0] * 100
    rates.forget(urls[50])
    for _ in range(7):
        rates_of(candidates, rates)
    assert rates_of(candidates, rates).tolist() == [rates.seconds(url) for url in urls]


def test_a_weight_counts_for_choices_and_for_no_prediction() -> None:
    candidates, ledger, rates = pool("ab", a=2.0), Ledger({}), Rates(1.0)
    for url in "ab":
        ledger.lease(candidates.by_url[url], Role.ENCODE, 8)
    assert times(candidates, Demand(3), ledger, rates).tolist() == [11.0, 11.0]
    assert times(candidates, Demand(3), ledger, rates, weighed=True).tolist() == [7.0, 11.0]
    assert soonest(candidates, Demand(3), ledger, rates) == 11.0
