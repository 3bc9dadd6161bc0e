"""Every state with every event, by the table; and what the rest of the proxy sees of it."""

from __future__ import annotations

import itertools

import pytest

from proxy.balancer.fleet import TRANSITIONS, Event, Fleet, IllegalTransition
from proxy.core import BOTH, Role, State, Switch

URL = "http://h:1"


@pytest.mark.parametrize(("state", "event"), [*itertools.product(State, Event)])
def test_the_table_is_what_happens(state: State, event: Event) -> None:
    fleet = Fleet()
    instance = fleet.join(URL, Role.DECODE, "native")
    instance.state = state
    if (wanted := TRANSITIONS[state].get(event)) is None:
        with pytest.raises(IllegalTransition, match=f"{event}.*{URL}.*{state}"):
            fleet.apply(instance, event, "x")
        assert instance.state is state
        return
    assert fleet.apply(instance, event, "why") is (wanted is not state)
    assert (instance.state, instance.reason) == (wanted, "why")
    assert (fleet.get(URL) is None) is (wanted is State.GONE)
    assert (fleet.ready(Role.DECODE) == [instance]) is (wanted is State.READY)


def test_every_state_has_a_row_and_every_life_can_end() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(Event.DRAIN in row for state, row in TRANSITIONS.items() if state is not State.GONE)


def test_only_instances_of_exactly_the_role_are_given_its_legs() -> None:
    fleet = Fleet()
    for port, role in enumerate([Role.ENCODE, Role.PREFILL, Role.DECODE, BOTH]):
        fleet.apply(fleet.join(f"http://h:{port}", role, "native"), Event.HEALTHY, "")
    assert [i.url for i in fleet.ready(BOTH)] == ["http://h:3"]
    assert [i.url for i in fleet.ready(Role.DECODE)] == ["http://h:2"]
    assert fleet.census()[BOTH][State.READY] == 1
    assert repr(fleet).startswith("<Fleet encode h:0 READY, ")


def test_joining_again_ends_a_drain_but_cannot_change_a_role() -> None:
    fleet = Fleet()
    instance = fleet.join(URL, Role.DECODE, "native")
    fleet.apply(instance, Event.DRAIN, "")
    assert fleet.join(URL, Role.DECODE, "native") is instance
    assert instance.state is State.JOINING
    with pytest.raises(ValueError, match="already known as decode"):
        fleet.join(URL, Role.PREFILL, "native")


def test_a_switch_keeps_an_instance_until_it_rejoins() -> None:
    fleet = Fleet()
    instance = fleet.join(URL, Role.DECODE, "native")
    instance.sources = frozenset({"configured"})
    fleet.begin(instance, Switch(Role.PREFILL, 9.0), "to be prefill")
    assert (instance.state, instance.reason) == (State.DRAINING, "to be prefill")
    instance.turn(Role.PREFILL)
    fleet.rejoin(instance, "turned")
    assert (instance.state, instance.switch) == (State.JOINING, None)
    assert (instance.role, instance.listed) == (Role.PREFILL, Role.DECODE)
    assert fleet.join(URL, Role.DECODE, "native") is fleet.join(URL, Role.PREFILL, "native") is instance
    fleet.begin(instance, Switch(Role.DECODE, 9.0), "back")
    assert fleet.join(URL, Role.DECODE, "native").switch is None, "who is registered again is not switched"
    instance.turn(Role.DECODE)
    assert instance.listed_as is None
    instance.sources = frozenset()
    fleet.begin(instance, Switch(Role.PREFILL, 9.0), "to be prefill")
    fleet.rejoin(instance, "turned")
    assert instance.state is State.DRAINING, "nobody lists it any more"


def test_removing_is_at_once_and_twice_is_no_error() -> None:
    fleet = Fleet()
    instance = fleet.join(URL, Role.DECODE, "native")
    assert fleet.remove(URL) is instance and instance.state is State.GONE
    assert fleet.remove(URL) is None and list(fleet) == []
