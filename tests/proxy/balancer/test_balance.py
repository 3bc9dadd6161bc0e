"""Choosing and charging are one step."""

import pytest

from proxy.balancer.policy import Demand
from proxy.core import Role
from tests.support.balancing import balancer, pool


def test_what_is_taken_is_seen_by_the_next_choice() -> None:
    three = pool((f"http://h:{port}" for port in range(3)), Role.DECODE)
    b = balancer()
    leases = [b.take(Role.DECODE, three, Demand(tokens)) for tokens in (100, 10, 50, 10)]
    assert [lease.instance.url[-1] for lease in leases] == ["0", "1", "2", "1"]
    leases[0].close()
    assert b.take(Role.DECODE, three, Demand(1)).instance.url == "http://h:0"
    assert b.ledger.load("http://h:0") == 1
    b.ledger.check()


def test_roles_have_policies_of_their_own() -> None:
    b = balancer()
    b.take(Role.PREFILL, pool(["http://p"], Role.PREFILL), Demand(5))
    assert b.take(Role.DECODE, pool(["http://d"], Role.DECODE), Demand(5)).instance.url == "http://d"


def test_a_forgotten_instance_returns_its_leases_quietly() -> None:
    b = balancer()
    lease = b.take(Role.DECODE, pool(["http://d"], Role.DECODE), Demand(5))
    b.forget(lease.instance)
    lease.close()
    assert b.ledger.leases() == b.ledger.load("http://d") == 0


def test_what_is_held_costs_what_is_left_of_it() -> None:
    b = balancer()
    lease = b.take(Role.ENCODE, pool(["http://e"], Role.ENCODE), Demand(100, "key", {"http://e": 7}))
    assert (lease.tokens, b.ledger.load("http://e")) == (7, 7)


def test_foreseeing_finds_the_soonest_and_charges_nothing() -> None:
    b = balancer()
    two = pool(["http://a", "http://b"], Role.PREFILL)
    rate = b.rates[Role.PREFILL].seconds("http://a")
    with b.take(Role.PREFILL, two, Demand(1000)) as lease:
        assert lease.instance.url == "http://a"
        assert b.foresee(Role.PREFILL, two, Demand(100)) == pytest.approx(100 * rate)
        assert b.foresee(Role.PREFILL, two, Demand(100, ready=2.0)) == pytest.approx(2.0 + 100 * rate)
        held = Demand(5000, held={"http://a": 10})
        assert b.foresee(Role.PREFILL, two, held) == pytest.approx(1010 * rate)
        assert b.foresee(Role.PREFILL, two, Demand(100, transfer={"http://b": 0.01})) == pytest.approx(
            100 * rate + 0.01
        )
        assert b.ledger.leases() == 1
