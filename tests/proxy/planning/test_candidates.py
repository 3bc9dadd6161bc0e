"""Who may take a leg now, by role, family and circuit."""

from __future__ import annotations

import pytest

from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.core import BOTH, Path, Role
from proxy.errors import BadRequest, NoInstance
from proxy.planning.candidates import NOBODY, Candidates
from proxy.planning.families import Families
from proxy.retry import Blame
from tests.support.fleets import job, mixture


def candidates(found: Fleet, rules: Families | None = None, inline: bool = False) -> tuple[Candidates, Breakers]:
    breakers = Breakers(Thresholds(1, 10.0))
    return Candidates(found, breakers, inline, rules or Families()), breakers


def unloaded(url: str) -> int:
    return 0


def test_a_pool_is_the_same_object_until_the_fleet_changes() -> None:
    found = mixture(a="both both")
    asked, breakers = candidates(found)
    first = asked.pool(BOTH, 0.0, NOBODY, "a")
    assert asked.pool(BOTH, 1.0, NOBODY, "a") is first and set(first) == {"http://a-both0", "http://a-both1"}
    assert set(asked.pool(BOTH, 0.0, {"http://a-both0"}, "a")) == {"http://a-both1"}
    breakers.permit("http://a-both1").failed(Blame.FAILURE, 0.0)
    assert set(asked.pool(BOTH, 0.0, NOBODY, "a")) == {"http://a-both0"}
    instance = found.get("http://a-both0")
    assert instance is not None
    found.apply(instance, Event.FAILED, "")
    with pytest.raises(NoInstance, match="no combined engine is ready") as refused:
        asked.route(job(), 4.0, NOBODY, "a")
    assert refused.value.retry_after == asked.wait(4.0) == 6.0
    with pytest.raises(NoInstance, match="no both engine is ready"):
        asked.some(BOTH, 4.0, NOBODY, "a")


def test_the_family_serves_the_request_has_its_model_and_is_the_least_loaded() -> None:
    asked, _ = candidates(mixture(a="both", b="encode both", c="encode both"))
    assert asked.family(job(), 0.0, unloaded) == "a"
    assert asked.family(job(10), 0.0, unloaded) == "b", "a has no encoder"
    assert asked.family(job(10), 0.0, lambda url: 5 if "b-both" in url else 0) == "c"
    assert candidates(mixture(b="both"))[0].family(job(), 0.0, unloaded) == "b"


def test_all_paths_that_could_serve_are_known_and_inline_ones_where_that_is_allowed() -> None:
    found = mixture(a="encode prefill decode both")
    assert candidates(found)[0].route(job(10), 0.0, NOBODY, "a").others == (Path.E_PD,)
    assert candidates(found, inline=True)[0].route(job(10), 0.0, NOBODY, "a").others == (Path.E_PD, Path.EPD)
    own = candidates(found, Families({"a"}), inline=True)[0]
    assert own.route(job(10), 0.0, NOBODY, "a").others == (Path.E_PD, Path.EP_D, Path.EPD)
    assert candidates(found, Families({"a"}))[0].route(job(10), 0.0, NOBODY, "a").others == (Path.E_PD,)


def test_a_role_that_is_done_need_not_be_up() -> None:
    asked, _ = candidates(mixture(a="prefill decode"))
    assert asked.route(job(10), 0.0, NOBODY, "a", Role.ENCODE).path is Path.E_P_D
    with pytest.raises(BadRequest, match="no encoder"):
        asked.route(job(10), 0.0, NOBODY, "a")


def test_encoders_of_the_engines_own_are_told_of() -> None:
    rules = Families(inline=("s",), feeds={"s": ("nobody",)})
    asked, _ = candidates(mixture(s="encode both"), rules)
    route = asked.route(job(10, 20), 0.0, NOBODY, "s")
    assert (route.path, route.reason) == (Path.EPD, "2 items, the engine calls the encoders")


def test_an_encoder_beside_engines_of_its_own_feeds_no_others() -> None:
    """How its embeddings travel is made for those; an engine of vLLM dies of one that is not where it looks."""
    rules = Families({"b"}, {"a": {"a", "b"}})
    assert set(candidates(mixture(a="encode", b="encode both"), rules)[0].pool(Role.ENCODE, 0.0, NOBODY, "b")) == {
        "http://a-encode0",
        "http://b-encode0",
    }
    asked, _ = candidates(mixture(a="encode both", b="encode both"), rules)
    for family in ("a", "b"):
        assert set(asked.pool(Role.ENCODE, 0.0, NOBODY, family)) == {f"http://{family}-encode0"}
    asked, _ = candidates(mixture(a="encode both", b="both"), rules)
    assert asked.route(job(10), 0.0, NOBODY, "b").path is Path.EPD, "as if nobody listed an encoder"


def encoding(found: Fleet, *urls: str) -> Fleet:
    """The same, where those say that they have an encoder of their own."""
    for url in urls:
        instance = found.get(url)
        assert instance is not None
        instance.facts = {"encodes": True}
        found.apply(instance, Event.FAILED, "")
        found.apply(instance, Event.HEALTHY, "")
    return found


def test_media_go_to_those_who_say_that_they_encode_where_no_encoder_is_listed() -> None:
    able, other = "http://a-both0", "http://a-both1"
    found = encoding(mixture(a="both both"), able)
    asked, _ = candidates(found)
    route = asked.route(job(10), 0.0, NOBODY, "a")
    assert (route.path, route.reason) == (Path.EPD, "1 item, encoded inline because no encoder is listed")
    assert set(asked.pool(BOTH, 0.0, NOBODY, "a", inline=True)) == {able}
    assert set(asked.pool(BOTH, 0.0, NOBODY, "a")) == {able, other}, "text goes to all"
    instance = found.get(able)
    assert instance is not None
    found.apply(instance, Event.FAILED, "")
    with pytest.raises(NoInstance):
        asked.some(BOTH, 0.0, NOBODY, "a", inline=True)


def test_an_encoder_that_is_listed_goes_before_those_who_encode_themselves() -> None:
    asked, _ = candidates(encoding(mixture(a="encode both"), "http://a-both1"))
    assert asked.route(job(10), 0.0, NOBODY, "a").others == ()
    asked, _ = candidates(encoding(mixture(a="encode both"), "http://a-both1"), inline=True)
    assert asked.route(job(10), 0.0, NOBODY, "a").others == (Path.EPD,)
