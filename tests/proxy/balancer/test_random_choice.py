"""Nobody is preferred, and the dice alone decide."""

from __future__ import annotations

from random import Random

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.random_choice import RandomChoice
from proxy.core import Role
from tests.support.balancing import pool


def test_all_have_the_same_chance_whatever_their_load() -> None:
    three, ledger = pool("abc"), Ledger({})
    ledger.lease(three.by_url["a"], Role.ENCODE, 1000)
    policy = RandomChoice(Means(dice=Random(1).random))
    chosen = [policy.choose(three, Demand(1), ledger) for _ in range(3000)]
    assert all(abs(chosen.count(url) - 1000) < 130 for url in "abc")  # five standard deviations


def test_the_ends_of_the_dice_are_candidates_too() -> None:
    three, ledger = pool("abc"), Ledger({})
    assert RandomChoice(Means(dice=lambda: 0.0)).choose(three, Demand(1), ledger) == "a"
    assert RandomChoice(Means(dice=lambda: 1 - 2**-53)).choose(three, Demand(1), ledger) == "c"
