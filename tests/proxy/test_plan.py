"""A plan's legs: who gets what, and that all of it is leased."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy import openai
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.core import BOTH, Api, Job, Path, Role
from proxy.errors import NoInstance
from proxy.families import Families
from proxy.openai import Identity
from proxy.plan import ALIKE, Holds, Planner
from proxy.retry import Blame
from tests.fakes.media import chat, image, part
from tests.support import balancing


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
    found = Fleet()
    for family, labels in families.items():
        for number, label in enumerate(labels.split()):
            instance = found.join(f"http://{family}-{label}{number}", Role.named(label), family)
            instance.model = f"model-of-{family}"
            found.apply(instance, Event.HEALTHY, "")
    return Planner(found, balancer, Breakers(Thresholds(2, 10.0)), inline, rules)


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
    p = mixed(balancer, sglang="encode")
    p._fleet.join("http://language", BOTH, "auto")
    with Holds() as leases, pytest.raises(NoInstance, match="no combined engine is ready"):
        p.draw(job(part(image())), 0.0, leases)


def test_a_plan_tells_of_encoders_that_only_the_engines_call(balancer: Balancer) -> None:
    rules = Families(inline=("sglang",), feeds={"sglang": ("nobody",)})
    p = mixed(balancer, rules, sglang="encode both")
    with Holds() as leases:
        plan = p.draw(job(part(image())), 0.0, leases)
        assert (plan.path, plan.reason, plan.encodes) == (Path.EPD, "1 item, the engine calls the encoders", [])
