"""Two different candidates, and the better of them."""

from __future__ import annotations

from random import Random

from proxy.balancer.ledger import Ledger
from proxy.balancer.policy import Demand, Means
from proxy.balancer.two_choices import TwoChoices
from proxy.core import Role
from tests.support.balancing import pool


def test_every_pair_is_drawn_and_the_most_loaded_is_never_chosen() -> None:
    four = pool("abcd")
    ledger = Ledger({})
    for url, tokens in zip("abcd", (40, 10, 30, 20), strict=True):
        ledger.lease(four.by_url[url], Role.ENCODE, tokens)
    policy = TwoChoices(Means(dice=Random(1).random))
    chosen = [policy.choose(four, Demand(1), ledger) for _ in range(6000)]
    shares = [chosen.count(url) for url in "bdca"]  # least loaded first: it wins 3 of 6 pairs, the next 2, the next 1
    assert shares[3] == 0
    assert all(abs(share - wanted) < 200 for share, wanted in zip(shares, (3000, 2000, 1000), strict=False))


def test_of_equals_the_one_used_longer_ago_and_then_the_name() -> None:
    two, ledger = pool("ba"), Ledger({})
    policy = TwoChoices(Means(dice=Random(1).random))
    assert {policy.choose(two, Demand(1), ledger) for _ in range(20)} == {"a"}
    ledger.lease(two.by_url["a"], Role.ENCODE, 1).close()
    assert {policy.choose(two, Demand(1), ledger) for _ in range(20)} == {"b"}
