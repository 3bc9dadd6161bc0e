"""Choosing and charging are one step."""

from random import Random

import pytest

from proxy.balancer import POLICIES
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
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


def encoders(urls: str) -> Pool:
    return pool(urls, Role.ENCODE)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_item_in_flight_is_joined_by_all_but_the_yardsticks(policy: str) -> None:
    b, three = balancer(policy), encoders("abc")
    first = b.take(Role.ENCODE, three, Demand(3200, "cat"))
    others = [b.take(Role.ENCODE, three, Demand(3200, "cat")) for _ in range(9)]
    where = {lease.instance.url for lease in (first, *others)}
    assert (len(where) == 1) is (policy not in ("random", "round_robin"))
    assert sum(lease.tokens for lease in (first, *others)) == len(where) * 3200 + (10 - len(where)) * 100
    b.ledger.check()


def test_nobody_joins_where_it_may_not_go_or_when_it_is_over() -> None:
    b, three = balancer("least_loaded"), encoders("abc")
    first = b.take(Role.ENCODE, three, Demand(3200, "cat"))
    assert first.instance.url == "a"
    elsewhere = b.take(Role.ENCODE, three.without({"a"}), Demand(3200, "cat"))
    assert (elsewhere.instance.url, elsewhere.tokens) == ("b", 3200)
    second = b.take(Role.ENCODE, three, Demand(3200, "cat"))
    assert second.instance.url == "a"
    elsewhere.close()
    first.close()
    assert b.take(Role.ENCODE, three, Demand(3200, "cat")).instance.url == "a", "one of them is still under way"
    b.holders.told("a", "cat", False)
    assert b.take(Role.ENCODE, encoders("a"), Demand(3200, "cat")).tokens == 3200, "it has lost it"


def test_what_an_encoder_holds_is_remembered_as_far_as_it_has_room_and_while_it_is_there() -> None:
    b, one = balancer("round_robin"), encoders("a")
    one.by_url["a"].facts = {"cache_tokens": 500}

    def tokens(key: str) -> int:
        with b.take(Role.ENCODE, one, Demand(320, key)) as lease:
            return lease.tokens

    assert [tokens(key) for key in ("cat", "cat", "dog", "dog", "cat")] == [320, 10, 320, 10, 320]
    assert b.foresee(Role.ENCODE, one, Demand(320, "cat")) < b.foresee(Role.ENCODE, one, Demand(320, "dog"))
    b.forget(one.by_url["a"])
    assert tokens("cat") == 320


def test_an_embedding_takes_the_room_of_its_tokens_whatever_it_cost() -> None:
    b, one = balancer("round_robin"), encoders("a")
    one.by_url["a"].facts = {"cache_tokens": 500}
    for key in ("cat", "dog"):
        b.take(Role.ENCODE, one, Demand(3200, key, room=200)).close()
    assert set(b.holders.holders("cat")) == set(b.holders.holders("dog")) == {"a"}
    b.take(Role.ENCODE, one, Demand(32, "cow", room=200)).close()
    assert not b.holders.holders("cat")


def test_a_held_item_goes_to_its_busy_holder_which_answers_at_once() -> None:
    b, two = balancer("affinity"), encoders("ab")
    with b.take(Role.ENCODE, two, Demand(320, "cat")) as lease:
        holder = lease.instance.url
    b.ledger.lease(two.by_url[holder], Role.ENCODE, 4000)
    assert b.take(Role.ENCODE, two, Demand(320, "cat")).instance.url == holder
    assert b.take(Role.ENCODE, two, Demand(320, "dog")).instance.url != holder


def test_items_that_recur_come_to_where_they_are_held() -> None:
    b, four, dice = balancer("affinity"), encoders("abcd"), Random(1)
    for _ in range(200):
        b.take(Role.ENCODE, four, Demand(1000, f"{dice.randrange(20)}")).close()
    assert all(len(b.holders.holders(f"{number}")) == 1 for number in range(20))
    assert len({next(iter(b.holders.holders(f"{number}"))) for number in range(20)}) == 4
