"""A plan's legs: who gets what, and that all of it is leased."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.balancer import POLICIES
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.core import ROLES, Api, Job, Role
from proxy.errors import NoInstance
from proxy.openai import Identity
from proxy.plan import Planner
from tests.fakes.media import chat, image, part


def job(*parts: dict[str, Any]) -> Job:
    return openai.parse(orjson.dumps(chat(*parts)), Api.CHAT, "id", Identity())


def fleet(**counts: int) -> Fleet:
    found = Fleet()
    for label, count in counts.items():
        for number in range(count):
            instance = found.join(f"http://{label}{number}", Role.named(label), "native")
            found.apply(instance, Event.HEALTHY, "")
    return found


def planner(balancer: Balancer, *, inline: bool = False, **counts: int) -> Planner:
    return Planner(fleet(**counts), balancer, Breakers(Thresholds(2, 10.0)), inline)


@pytest.fixture
def balancer() -> Balancer:
    return Balancer({role: POLICIES["least_loaded"]() for role in ROLES})


def test_items_spread_over_encoders_largest_first_and_keep_their_order(balancer: Balancer) -> None:
    j = job(part(image(56, 56)), part(image(560, 560)), part(image(84, 56)), part(image(112, 56)))
    with ExitStack() as leases:
        drawn = planner(balancer, encode=2, prefill=1, decode=1).draw(j, 0.0, leases)
        shares = {leg.instance.url: [item.index for item in leg.items] for leg in drawn.encodes}
        assert sorted(shares.values()) == [[0, 2, 3], [1]]
        assert balancer.ledger.leases(role=Role.ENCODE) == 4
        assert balancer.ledger.load("http://prefill0") == j.prompt_tokens
        assert balancer.ledger.load("http://decode0") == j.prompt_tokens + j.output_tokens
        balancer.ledger.check()
    assert balancer.ledger.leases() == 0


def test_an_item_that_occurs_twice_is_encoded_once(balancer: Balancer) -> None:
    same, other = image(8, 8), image(16, 8)
    url = {"type": "image_url", "image_url": {"url": "https://h/a.png"}}
    with ExitStack() as leases:
        items = job(part(same), part(other), part(same), url, url)
        drawn = planner(balancer, encode=1, both=1).draw(items, 0.0, leases)
    assert [item.index for leg in drawn.encodes for item in leg.items] == [0, 1, 3]


def test_a_plan_that_cannot_be_drawn_leaves_nothing_leased(balancer: Balancer) -> None:
    with pytest.raises(NoInstance), ExitStack() as leases:
        planner(balancer, prefill=1).draw(job(), 0.0, leases)
    assert balancer.ledger.leases() == 0
