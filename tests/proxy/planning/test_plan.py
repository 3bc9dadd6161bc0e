"""A plan's legs: who gets what, and that all of it is leased."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import openai
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.core import BOTH, ROLES, Api, Job, Leg, Path, Plan, Role, State
from proxy.errors import NoInstance, ProxyError
from proxy.openai import Identity
from proxy.planning.families import Families
from proxy.planning.links import HOP
from proxy.planning.plan import ALIKE, Holds, Planner
from proxy.planning.prospects import Sight
from proxy.retry import Blame
from tests.fakes.media import chat, image, part
from tests.support import balancing
from tests.support.fleets import Labelled, mixture
from tests.support.fleets import job as costly


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


def mixed(balancer: Balancer, rules: Families = ALIKE, inline: bool = False, **families: str) -> Planner:
    """Families by name, as roles of their engines: native="encode both"."""
    return Planner(mixture(**families), balancer, Breakers(Thresholds(2, 10.0)), inline, rules)


@pytest.fixture
def balancer() -> Balancer:
    return balancing.balancer()


def test_items_spread_over_encoders_largest_first_and_keep_their_order(balancer: Balancer) -> None:
    j = job(part(image(56, 56)), part(image(560, 560)), part(image(84, 56)), part(image(112, 56)))
    with Holds() as leases:
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
    with Holds() as leases:
        items = job(part(same), part(other), part(same), url, url)
        drawn = planner(balancer, encode=1, both=1).draw(items, 0.0, leases)
    assert [item.index for leg in drawn.encodes for item in leg.items] == [0, 1, 3]


def test_a_plan_that_cannot_be_drawn_leaves_nothing_leased(balancer: Balancer) -> None:
    with pytest.raises(NoInstance), Holds() as leases:
        planner(balancer, prefill=1).draw(job(), 0.0, leases)
    assert balancer.ledger.leases() == 0


def test_a_mended_plan_avoids_who_failed_and_keeps_its_encoders(balancer: Balancer) -> None:
    drawing = planner(balancer, encode=1, prefill=2, decode=2)
    with Holds() as holds:
        j = job(part(image()))
        first = drawing.draw(j, 0.0, holds)
        failed = first.leg(Role.DECODE).instance.url
        second = drawing.redraw(first, j, 0.0, {failed}, holds)
        assert second is not None and second.encodes == first.encodes
        assert second.leg(Role.DECODE).instance.url != failed
        assert balancer.ledger.leases(role=Role.DECODE) == 1, "what failed is given back at once"
        assert drawing.redraw(second, j, 0.0, {"http://decode0", "http://decode1"}, holds) is None
    assert balancer.ledger.leases() == 0


def test_a_pair_that_cannot_be_mended_gives_way_to_a_combined_engine(balancer: Balancer) -> None:
    drawing = planner(balancer, encode=1, prefill=1, decode=1, both=1)
    with Holds() as holds:
        first = drawing.draw(job(), 0.0, holds)
        second = drawing.redraw(first, job(), 0.0, {"http://prefill0"}, holds)
        assert (first.path, second and second.path) == (Path.P_D, Path.PD)


def test_encoders_that_have_gone_since_do_not_keep_a_plan_from_being_mended(balancer: Balancer) -> None:
    with Holds() as holds:
        j, found = job(part(image())), fleet(encode=1, prefill=1, decode=2)
        drawing = Planner(found, balancer, Breakers(Thresholds(2, 10.0)))
        first = drawing.draw(j, 0.0, holds)
        encoder = found.get("http://encode0")
        assert encoder is not None
        found.apply(encoder, Event.FAILED, "")
        assert drawing.redraw(first, j, 0.0, {first.leg(Role.DECODE).instance.url}, holds) is not None


def test_open_circuits_are_out_of_every_plan_and_say_when_they_are_back(balancer: Balancer) -> None:
    drawing = planner(balancer, both=1)
    for _ in range(2):
        drawing.breakers.permit("http://both0").failed(Blame.FAILURE, 0.0)
    with Holds() as holds:
        with pytest.raises(NoInstance, match="1 OPEN") as refused:
            drawing.draw(job(), 4.0, holds)
        assert refused.value.retry_after == 6.0
        assert drawing.draw(job(), 10.0, holds).path is Path.PD
        with pytest.raises(NoInstance):
            drawing.draw(job(), 10.0, holds)  # one trial at a time
    with Holds() as holds:
        assert drawing.draw(job(), 10.0, holds).path is Path.PD, "a leg that never ran was no trial"


@pytest.mark.parametrize("inline", [False, True])
def test_inline_is_for_those_who_asked_for_it(balancer: Balancer, inline: bool) -> None:
    drawing = planner(balancer, inline=inline, encode=1, prefill=1, decode=1, both=1)
    with Holds() as holds:
        j = job(part(image()))
        drawn = drawing.draw(j, 0.0, holds)
        assert drawing.can_inline(drawn, 0.0) is inline
        found = drawing.inline(drawn, j, 0.0, holds)
        assert (found and found.path) == (Path.EPD if inline else None)
        if inline:
            assert (balancer.ledger.leases(role=Role.PREFILL), balancer.ledger.leases(role=BOTH)) == (0, 1)


@pytest.mark.parametrize("able", [1, 2])
def test_media_without_encoders_go_where_media_are_taken(balancer: Balancer, able: int) -> None:
    found = mixture(a="encode both both")
    instance = found.get(f"http://a-both{able}")
    assert instance is not None
    instance.facts = {"encodes": True}
    drawing = Planner(found, balancer, Breakers(Thresholds(2, 10.0)), True)
    for _ in range(4):  # the balancer sends them here and there
        with Holds() as holds:
            j = job(part(image()))
            drawn = drawing.draw(j, 0.0, holds)
            inline = drawing.inline(drawn, j, 0.0, holds)
            assert inline is not None and inline.leg(BOTH).instance is instance
            assert balancer.ledger.leases(role=BOTH) == 1


def test_a_plan_never_mixes_families_and_follows_the_model(balancer: Balancer) -> None:
    drawing = mixed(balancer, a="encode both", b="encode prefill decode")
    seen = set()
    with Holds() as holds:
        for _ in range(4):
            drawn = drawing.draw(job(part(image())), 0.0, holds)
            families = {leg.instance.dialect for leg in drawn.legs}
            assert len(families) == 1
            seen |= families
        assert seen == {"a", "b"}, "both take part"
        for family in ("a", "b"):
            j = openai.parse(orjson.dumps(chat() | {"model": f"model-of-{family}"}), Api.CHAT, "id", Identity())
            for _ in range(3):
                assert {leg.instance.dialect for leg in drawing.draw(j, 0.0, holds).legs} == {family}


def test_who_fails_is_replaced_within_the_family(balancer: Balancer) -> None:
    drawing = mixed(balancer, a="encode encode both both", b="encode both")
    j = openai.parse(orjson.dumps(chat(part(image())) | {"model": "model-of-a"}), Api.CHAT, "id", Identity())
    with Holds() as holds:
        drawn = drawing.draw(j, 0.0, holds)
        tried = {drawn.leg(BOTH).instance.url}
        redrawn = drawing.redraw(drawn, j, 0.0, tried, holds)
        assert redrawn is not None
        tried.add(redrawn.leg(BOTH).instance.url)
        assert tried == {"http://a-both2", "http://a-both3"}
        assert drawing.redraw(redrawn, j, 0.0, tried, holds) is None
        one = drawing.encoder(j.items, 0.0, {drawn.encodes[0].instance.url}, "a", holds)
        assert one is not None and one.instance.dialect == "a"
        assert one.instance.url in balancer.holders.holders(j.items[0].identity), "others that have it may join"
        assert drawing.encoder(j.items, 0.0, {"http://a-encode0", "http://a-encode1"}, "a", holds) is None


def test_a_family_that_cannot_serve_a_request_leaves_it_to_one_that_can(balancer: Balancer) -> None:
    drawing = mixed(balancer, a="both", b="encode both")
    with Holds() as holds:
        for _ in range(3):
            assert drawing.draw(job(part(image())), 0.0, holds).leg(BOTH).instance.dialect == "b"


def test_families_that_encode_get_media_where_no_encoder_is_listed(balancer: Balancer) -> None:
    j = job(part(image()))
    with Holds() as holds:
        assert mixed(balancer, Families({"a"}), a="prefill decode").draw(j, 0.0, holds).path is Path.EP_D
        assert mixed(balancer, Families({"a"}), a="both").draw(j, 0.0, holds).path is Path.EPD
        apart = mixed(balancer, Families({"a"}), inline=True, a="encode prefill decode")
        drawn = apart.draw(j, 0.0, holds)
        found = apart.inline(drawn, j, 0.0, holds)
        assert (drawn.path, found and found.path) == (Path.E_P_D, Path.EP_D)
        assert found is not None and found.legs == drawn.legs, "the same engines, which get media as well"


def test_an_encoder_may_feed_another_family(balancer: Balancer) -> None:
    rules = Families({"a"}, {"b": {"a", "b"}})
    drawing = mixed(balancer, rules, a="prefill decode", b="encode encode")
    j = job(part(image()))
    with Holds() as holds:
        drawn = drawing.draw(j, 0.0, holds)
        assert drawn.path is Path.E_P_D
        (leg,) = drawn.encodes
        other = drawing.encoder(j.items, 0.0, {leg.instance.url}, "a", holds)
        assert other is not None and {leg.instance.dialect, other.instance.dialect} == {"b"}
        again = drawing.encode_again(drawn, j, 0.0, holds)
        assert [leg.instance.dialect for leg in again.encodes] == ["b"]
        apart = mixed(balancer, Families({"a"}), a="prefill decode", b="encode encode")
        assert apart.draw(j, 0.0, holds).path is Path.EP_D, "as if nobody listed an encoder"


def test_encoders_wait_for_engines_whose_family_is_not_known_yet(balancer: Balancer) -> None:
    """Their embeddings may turn out to be of use: nobody is told that media can never be had here."""
    found = Fleet()
    found.apply(found.join("http://encode", Role.ENCODE, "sglang"), Event.HEALTHY, "")
    found.join("http://language", BOTH, "auto")
    drawing = Planner(found, balancer, Breakers(Thresholds(2, 10.0)))
    with Holds() as leases, pytest.raises(NoInstance, match="no combined engine is ready"):
        drawing.draw(job(part(image())), 0.0, leases)


def test_a_plan_tells_of_encoders_that_only_the_engines_call(balancer: Balancer) -> None:
    rules = Families(inline=("sglang",), feeds={"sglang": ("nobody",)})
    p = mixed(balancer, rules, sglang="encode both")
    with Holds() as leases:
        plan = p.draw(job(part(image())), 0.0, leases)
        assert (plan.path, plan.reason, plan.encodes) == (Path.EPD, "1 item, the engine calls the encoders", [])


# ---- by what is foreseen


def weighed(found: Labelled, *, inline: bool = False, rules: Families = ALIKE, **sight: Any) -> Planner:
    seen = Sight(frozenset(found.weighed), **sight)
    return Planner(found.fleet, found.balancer, Breakers(Thresholds(2, 10.0)), inline, rules, seen)


def test_a_plan_tells_its_first_token_where_somebody_asks(balancer: Balancer) -> None:
    with Holds() as holds:
        assert planner(balancer, both=1).draw(job(), 0.0, holds).foreseen == 0.0
    found = Labelled(weighed=())
    found.add(Role.ENCODE, rate=1e-4)
    found.add(BOTH, rate=1e-4)
    asking, asked = weighed(found, always=True), costly(1000, text=100, nbytes=0)
    with Holds() as holds:
        assert asking.foresee(asked, 0.0) == pytest.approx(HOP + 0.1 + 0.11)
        plan = asking.draw(asked, 0.0, holds)
        assert plan.foreseen == pytest.approx(HOP + 0.1 + 0.11) and "; foreseen=212ms; " in str(plan)
        assert asking.foresee(asked, 0.0) > plan.foreseen
    assert found.balancer.ledger.leases() == 0


def test_media_are_encoded_inline_where_that_is_sooner_and_allowed() -> None:
    found = Labelled(weighed=())
    (encoder,) = found.add(Role.ENCODE, rate=1e-4)
    found.add(BOTH, rate=1e-4)
    asked = costly(1000, text=100)
    lease = found.balancer.ledger.lease(encoder, Role.ENCODE, 9000)
    with Holds() as holds:
        assert weighed(found).draw(costly(999), 0.0, holds).path is Path.E_PD
    drawing = weighed(found, inline=True)
    with Holds() as holds:
        plan = drawing.draw(asked, 0.0, holds)
        assert (plan.path, plan.reason) == (Path.EPD, "1 item, 210 ms inline, 1112 ms encoded apart")
        assert found.balancer.ledger.load(plan.leg(BOTH).instance.url) == asked.prompt_tokens + 16 + 1000
    lease.close()
    with Holds() as holds:
        assert drawing.draw(asked, 0.0, holds).path is Path.EPD, "a hop sooner"
        assert drawing.foresee(asked, 0.0) == pytest.approx(0.2116 + 0.11), "of the sooner path"
        assert drawing.draw(asked, 0.0, holds).path is Path.E_PD, "while that one is before it"


def _prefilled(leg: Leg) -> None:
    assert leg.hold is not None
    leg.hold.prefilled()


def test_what_is_prefilled_is_no_load_and_on_its_way_no_more(balancer: Balancer) -> None:
    drawing = planner(balancer, encode=1, prefill=1, decode=1, both=1)
    with Holds() as holds:
        drawn = drawing.draw(job(part(image())), 0.0, holds)
        for leg in drawn.legs:
            _prefilled(leg)
        left = [balancer.ledger.load(leg.instance.url) > 0 for leg in drawn.legs]
        assert left == [True, False, True], "encoding and decoding go on"
        balancer.ledger.check()
    assert balancer.ledger.leases() == 0


@pytest.mark.parametrize("weighs", [(), ROLES])
def test_embeddings_go_where_there_is_room_for_them(weighs: Sequence[Role]) -> None:
    found = Labelled(weighed=weighs)
    found.add(Role.ENCODE)
    found.add(Role.PREFILL, 2)
    found.add(Role.DECODE)
    drawing = weighed(found, max_embedding_bytes=2500)
    with Holds() as first, Holds() as second, Holds() as third:
        plans = [drawing.draw(costly(works), 0.0, holds) for works, holds in ((2, first), (2, second))]
        one, other = (plan.leg(Role.PREFILL).instance.url for plan in plans)
        assert one != other and not drawing.has_room(costly(1), 0.0)
        assert drawing.has_room(job(), 0.0), "text needs none"
        _prefilled(plans[0].leg(Role.PREFILL))
        assert drawing.has_room(costly(2), 0.0)
        found.balancer.ledger.lease(plans[0].leg(Role.PREFILL).instance, Role.PREFILL, 100_000)
        assert drawing.draw(costly(2), 0.0, third).leg(Role.PREFILL).instance.url == one, "there is room, if no peace"
        assert drawing.draw(costly(2), 0.0, third).leg(Role.PREFILL).instance.url == other, "who was let in is served"
    assert drawing.has_room(costly(1000), 0.0), "one alone may have more"


def test_what_keeps_a_plan_from_being_drawn_does_not_keep_it_waiting() -> None:
    found = Labelled()
    found.add(Role.ENCODE)
    found.add(BOTH)
    drawing = weighed(found, max_embedding_bytes=1000)
    with Holds() as holds:
        reader = drawing.draw(costly(2), 0.0, holds).leg(BOTH).instance
        assert not drawing.has_room(costly(2), 0.0)
        found.fleet.apply(reader, Event.FAILED, "")
        assert drawing.has_room(costly(2), 0.0)
        with pytest.raises(NoInstance):
            drawing.draw(costly(2), 0.0, holds)


# ---- whatever happens

LABELS = st.sampled_from(({}, {"host": "a", "rack": "r"}, {"host": "b", "rack": "r"}, {"rack": "s"}))
STEP = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(ROLES), LABELS),
    st.tuples(st.just("event"), st.integers(0, 20), st.sampled_from((*[Event.HEALTHY] * 4, Event.FAILED, Event.DRAIN))),
    st.tuples(st.just("break"), st.integers(0, 20), st.booleans()),
    st.tuples(st.just("observe"), st.integers(0, 20), st.sampled_from((1e-5, 1e-4, 1e-3))),
    st.tuples(st.just("draw"), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 3)),
    st.tuples(st.just("redraw"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 5), st.none()),
)


class Life:
    """A planner and whatever may happen to its fleet. Every leg is checked as it is drawn."""

    def __init__(self, weighed: Sequence[Role], inline: bool, family: str) -> None:
        self.found = Labelled(weighed=weighed, family=family)
        for role in (Role.ENCODE, Role.PREFILL, Role.DECODE, BOTH):
            self.found.add(role, 2, rate=1e-4, host="a", rack="r")
        self.breakers = Breakers(Thresholds(2, 10.0))
        sight = Sight(frozenset(weighed), always=True, max_embedding_bytes=3000)
        self.planner = Planner(self.found.fleet, self.found.balancer, self.breakers, inline, Families({"vllm"}), sight)
        self.now = 0.0
        self.running: list[tuple[Plan, Job, Holds]] = []
        self.said: list[str] = []

    def step(self, what: str, one: Any, other: Any) -> None:
        self.now += 1.0
        instances = list(self.found.fleet)
        instance = instances[one % len(instances)] if isinstance(one, int) and instances else None
        allowed = {i.url for i in instances if i.state is State.READY and self.breakers.allows(i.url, self.now)}
        if what == "join":
            self.found.add(one, **other)
        elif what == "event" and instance is not None:
            self.found.fleet.apply(instance, other, "")
        elif what == "break" and instance is not None:
            permit = self.breakers.permit(instance.url)
            permit.failed(Blame.FAILURE, self.now) if other else permit.succeeded()
        elif what == "observe" and instance is not None:
            self.found.rates[instance.role].observe(instance.url, 1, 0, other)
        elif what == "draw":
            self._draw(costly(*(100 * (1 + n) for n in one), text=1 + 2000 * other), allowed)
        elif what == "redraw" and one < len(self.running):
            self._redraw(one, other, allowed)
        elif what == "end" and one < len(self.running):
            self.running.pop(one)[2].close()
        self.found.balancer.ledger.check()

    def _draw(self, asked: Job, allowed: set[str]) -> None:
        holds = Holds()
        try:
            plan = self.planner.draw(asked, self.now, holds)
        except ProxyError as error:
            holds.close()
            self.said.append(str(error))
            return
        assert {leg.instance.url for leg in plan.legs} <= allowed
        assert {i.identity for i in asked.items} == {i.identity for leg in plan.encodes for i in leg.items} or (
            "encode" not in str(plan) or "in the engine's KV" in plan.reason or "inline" in plan.reason
        )
        assert plan.foreseen > 0
        self.running.append((plan, asked, holds))
        self.said.append(str(plan))

    def _redraw(self, number: int, encoders: bool, allowed: set[str]) -> None:
        plan, asked, holds = self.running[number]
        tried = {leg.instance.url for leg in plan.legs if leg.role is not Role.ENCODE}
        try:
            again = (
                self.planner.encode_again(plan, asked, self.now, holds)
                if encoders
                else self.planner.redraw(plan, asked, self.now, tried, holds)
            )
        except NoInstance:
            again = None
        if again is not None:
            new = {leg.instance.url for leg in again.legs if leg not in plan.legs}
            assert new <= allowed and (encoders or not new & tried)
            self.running[number] = again, asked, holds
        self.said.append(str(again))

    def end(self) -> None:
        for _, _, holds in self.running:
            holds.close()
        assert self.found.balancer.ledger.leases() == 0
        assert self.planner.has_room(costly(1 << 20), self.now)


@given(st.lists(STEP, max_size=40), st.sampled_from(((), ROLES)), st.booleans(), st.sampled_from(("native", "vllm")))
def test_only_who_may_be_used_is_ever_picked_and_the_same_of_the_same(
    steps: list[tuple[str, Any, Any]], weighs: Sequence[Role], inline: bool, family: str
) -> None:
    lives = Life(weighs, inline, family), Life(weighs, inline, family)
    for life in lives:
        for step in steps:
            life.step(*step)
        life.end()
    assert lives[0].said == lives[1].said
