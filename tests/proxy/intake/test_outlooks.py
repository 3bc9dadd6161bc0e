"""What is foreseen of a request: with engines idle and busy, with media and without."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import openai
from proxy.advice import flow
from proxy.advice.sizing import Sizing
from proxy.balancer import POLICIES
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.balancer.policy import Means
from proxy.breaker import Breakers, Thresholds
from proxy.core import BOTH, ROLES, Api, Job, Role, Stage
from proxy.intake.outlooks import Outlooks, idle
from proxy.openai import Identity
from proxy.planning.plan import Holds, Planner
from proxy.planning.prospects import Sight
from tests.fakes.media import chat, image, part

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


class Site:
    def __init__(self, room: int | None = None, **engines: int) -> None:
        self.fleet = Fleet()
        for label, count in engines.items():
            for number in range(count):
                made = self.fleet.join(f"http://{label}:{number + 1}", Role.named(label), "native")
                self.fleet.apply(made, Event.HEALTHY, "healthy")
        self.balancer = Balancer({role: POLICIES["least_loaded"](Means(role)) for role in ROLES})
        breakers, sight = Breakers(Thresholds()), Sight(max_embedding_bytes=room)
        planners = [Planner(self.fleet, b, breakers, sight=sight) for b in (self.balancer, idle(self.balancer))]
        self.planner = planners[0]
        sizing = Sizing(self.fleet, self.balancer, flow.alone(), lambda: 1.0)
        self.outlooks = Outlooks(*planners, self.fleet, self.balancer, sizing, lambda: 1.0)

    def busy(self, role: Role, seconds: float) -> None:
        """Every engine of the role has work for so long."""
        for instance in self.fleet.ready(role):
            self.balancer.ledger.lease(instance, role, round(seconds / PRIORS[role]))


def job(images: int = 0) -> Job:
    body = chat(*(part(image(64, 32 + number)) for number in range(images)))
    return openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity())


@pytest.mark.parametrize("engines", [{"encode": 2, "prefill": 2, "decode": 1}, {"encode": 1, "both": 2}])
def test_an_idle_fleet_is_seen_as_idle(engines: dict[str, int]) -> None:
    outlook = Site(**engines).outlooks.of(job(1))
    assert outlook.first == outlook.first_idle > 0
    assert outlook.pace == outlook.pace_idle > 0 and outlook.room


@given(st.floats(0.1, 20), st.floats(0.1, 20), st.booleans())
def test_what_is_before_a_request_makes_it_late_and_the_longest_wait_is_named(
    encode: float, prefill: float, media: bool
) -> None:
    site = Site(encode=2, prefill=1, decode=1)
    site.busy(E, encode)
    site.busy(P, prefill)
    outlook = site.outlooks.of(job(2 if media else 0))
    assert outlook.first - outlook.first_idle == pytest.approx(max(encode, prefill) if media else prefill, rel=0.01)
    if not media or prefill > encode * 1.01:
        assert outlook.stage is Stage.PREFILL
    elif encode > prefill * 1.01:
        assert outlook.stage is Stage.ENCODE


def test_who_decodes_beside_others_is_slower() -> None:
    site = Site(prefill=1, decode=2)
    first, second = site.fleet.ready(D)
    site.balancer.ledger.lease(first, D, 10)
    assert site.outlooks.of(job()).pace == site.outlooks.of(job()).pace_idle, "one decodes nothing"
    site.balancer.ledger.lease(second, D, 10)
    assert site.outlooks.of(job()).pace > site.outlooks.of(job()).pace_idle


def test_where_nobody_is_ready_nothing_is_foreseen() -> None:
    for engines in ({}, {"prefill": 1}, {"encode": 1}):
        assert Site(**engines).outlooks.of(job(1)).first == 0
    site = Site(both=1)
    site.busy(BOTH, 5.0)
    assert site.outlooks.of(job()).first > 5


def test_embeddings_on_their_way_take_room_until_they_are_there() -> None:
    site = Site(room=1, encode=1, prefill=2, decode=1)
    with Holds() as first, Holds() as second:
        site.planner.draw(job(1), 0.0, first)
        assert site.outlooks.of(job(1)).room, "the other prefill engine has some"
        site.planner.draw(job(1), 0.0, second)
        assert not site.outlooks.of(job(1)).room and site.outlooks.of(job()).room
    assert site.outlooks.of(job(1)).room


def test_an_item_that_an_encoder_holds_is_soon_there() -> None:
    site = Site(encode=1, prefill=1, decode=1)
    unknown = site.outlooks.of(job(1))
    with Holds() as holds:
        site.planner.draw(job(1), 0.0, holds)
    known = site.outlooks.of(job(1))
    assert known.first == known.first_idle <= unknown.first_idle
