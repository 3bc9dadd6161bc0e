"""A fleet that several look at through one memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import roster
from proxy.balancer.fleet import TRANSITIONS, Event
from proxy.balancer.roster import Roster
from proxy.core import Instance, Role, State, Switch

URLS = [f"http://h:{port}" for port in range(4)]


def rosters(count: int) -> tuple[list[Roster], list[tuple[Instance, State, State]]]:
    """Fleets on one memory; and what they were told: whom, the state before and after."""
    buffer = bytearray(roster.SIZE)
    told: list[tuple[Instance, State, State]] = []

    def tell(instance: Instance, before: State) -> None:
        told.append((instance, before, instance.state))

    return [Roster(buffer, told=tell) for _ in range(count)], told


def shown(fleet: Roster) -> list[tuple[object, ...]]:
    return [(i.url, i.role, i.dialect, i.state, i.reason, i.model, i.facts) for i in fleet]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(URLS), st.sampled_from(["join", "remove", *Event]))))
def test_whoever_changes_the_fleet_all_see_the_same(steps: list[tuple[int, str, str]]) -> None:
    fleets, _ = rosters(3)
    for who, url, what in steps:
        fleet = fleets[who]
        instance = fleet.get(url)
        if what == "join":
            fleet.join(url, Role.DECODE, "native")
        elif what == "remove":
            fleet.remove(url)
        elif instance is not None and Event(what) in TRANSITIONS[instance.state]:
            fleet.apply(instance, Event(what), f"{what} by {who}")
        assert shown(fleets[0]) == shown(fleets[1]) == shown(fleets[2])
        assert fleets[0].census() == fleets[1].census()
    assert shown(Roster(fleets[0]._bytes)) == shown(fleets[0]), "a worker that starts late"


def test_an_instance_stays_the_same_object_and_hears_of_its_end() -> None:
    (here, there), told = rosters(2)
    here.join(URLS[0], Role.DECODE, "auto")
    ours, theirs = here.get(URLS[0]), there.get(URLS[0])
    assert ours is not None and theirs is not None and ours is not theirs
    theirs.dialect = "native"  # as a probe sets it, before the event
    there.apply(theirs, Event.HEALTHY, "healthy")
    assert here.get(URLS[0]) is ours
    assert (ours.state, ours.dialect) == (State.READY, "native")
    here.remove(URLS[0])
    assert there.get(URLS[0]) is None
    assert theirs.state is State.GONE
    assert told == [(ours, State.JOINING, State.READY), (theirs, State.READY, State.GONE)]
    assert here.apply(ours, Event.HEALTHY, "") is there.apply(theirs, Event.HEALTHY, "") is False


def test_what_was_set_here_is_not_undone_by_news_of_something_else() -> None:
    (here, there), _ = rosters(2)
    instance = here.join(URLS[0], Role.DECODE, "auto")
    instance.model = "tiny"
    there.join(URLS[1], Role.PREFILL, "auto")
    other = there.get(URLS[0])
    assert other is not None
    there.apply(other, Event.DRAIN, "drained")
    here.refresh()
    assert (instance.state, instance.model) == (State.DRAINING, "tiny")
    here.join(URLS[0], Role.DECODE, "auto")
    there.refresh()
    assert other.model == "tiny"


def test_what_was_set_without_an_event_can_be_shared() -> None:
    (here, there), _ = rosters(2)
    here.join(URLS[0], Role.DECODE, "native").reason = "it sleeps"
    other = there.get(URLS[0])
    assert other is not None and other.reason == "not probed yet"
    here.share()
    here.share()
    assert next(iter(there)).reason == "it sleeps"
    assert (here.takeovers, there.takeovers) == (0, 2)


def test_a_reader_is_never_shown_half_a_fleet() -> None:
    (here, there), _ = rosters(2)
    here.join(URLS[0], Role.DECODE, "native")
    before = shown(there)
    with pytest.raises(KeyError), here.changing():
        here._instances[URLS[1]] = Instance(URLS[1], Role.DECODE, "native")
        raise KeyError  # killed on the way
    assert shown(there) == before


def test_a_fleet_that_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    (here, there), _ = rosters(2)
    here.join(URLS[0], Role.DECODE, "native")
    with pytest.raises(ValueError, match="2 instances are more"):
        here.join("http://" + "h" * roster.SIZE, Role.DECODE, "native")
    assert len(list(here)) == len(list(there)) == 1
    there.join(URLS[1], Role.DECODE, "native")
    assert len(list(here)) == 2


def test_twelve_hundred_instances_fit_with_all_they_may_say() -> None:
    (here, there), _ = rosters(2)
    with here.changing():
        for number in range(1200):
            instance = here.join(f"http://encoder-{number}.engines.svc:8000", Role.ENCODE, "native")
            instance.reason, instance.facts = "r" * 300, {"labels": "f" * 1000}
    assert len(list(there)) == 1200


def test_facts_of_an_instance_are_everybodys() -> None:
    (here, there), _ = rosters(2)
    instance = here.join(URLS[0], Role.PREFILL, "vllm", {"bootstrap_port": 8998})
    other = there.get(URLS[0])
    assert other is not None and other.facts == {"bootstrap_port": 8998}
    instance.facts = {**instance.facts, "engine_ids": {"0": "e"}}
    here.share()
    assert there.get(URLS[0]) is other
    assert other.facts == {"bootstrap_port": 8998, "engine_ids": {"0": "e"}}


def test_an_instances_secret_is_every_workers_and_nobody_elses() -> None:
    (here, there), _ = rosters(2)
    here.join(URLS[0], Role.DECODE, "native").secret = "s3cret"
    here.share()
    other = there.get(URLS[0])
    assert other is not None and other.secret == "s3cret"
    assert "s3cret" not in repr(other)


def test_a_switch_is_everybodys() -> None:
    (here, there), _ = rosters(2)
    instance = here.join(URLS[0], Role.DECODE, "native")
    here.begin(instance, Switch(Role.PREFILL, 12.34), "to be prefill")
    other = there.get(URLS[0])
    assert other is not None
    assert (other.state, other.switch) == (State.DRAINING, Switch(Role.PREFILL, 12.34))
    with there.changing():
        other.turn(Role.PREFILL)
    here.refresh()
    assert (instance.role, instance.listed, instance.switch) == (Role.PREFILL, Role.DECODE, other.switch)
    there.rejoin(other, "turned")
    here.refresh()
    assert instance.switch is None
