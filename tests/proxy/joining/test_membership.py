"""Who is in the fleet, by who lists it; also as two workers see it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer import roster
from proxy.balancer.fleet import Event, Fleet
from proxy.balancer.roster import Roster
from proxy.core import Instance, Role, State
from proxy.joining import heartbeats
from proxy.joining.heartbeats import Heartbeats
from proxy.joining.membership import CONFIGURED, REGISTERED, Listed, Membership
from proxy.settings import Endpoint
from tests.fakes.deployment import deployment
from tests.fakes.media import chat
from tests.fakes.native import Language
from tests.support.waiting import until

A, B, C = (f"http://10.0.0.{number}:80" for number in range(1, 4))
NAME = "dns+http://enc:80"


class Scene:
    """A membership alone, and what it forgot."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.gone: list[str] = []
        self.membership = Membership(self.fleet, heartbeats.alone(), lambda instance: self.gone.append(instance.url))

    def configure(self, *texts: str, role: Role = Role.DECODE) -> bool:
        return self.membership.configure(listed(*texts, role=role))

    def find(self, *urls: str, name: str = NAME) -> bool:
        return self.membership.found(name, [url.removeprefix("http://") for url in urls])

    def register(self, url: str, life: str = "1", until: float | None = 10.0, role: Role = Role.DECODE) -> bool:
        return self.membership.register(role, Endpoint.parse(url, "auto"), life, until) is not None

    def instance(self, url: str) -> Instance:
        found = self.fleet.get(url)
        assert found is not None
        return found

    def up(self, url: str) -> None:
        self.fleet.apply(self.instance(url), Event.HEALTHY, "healthy")

    def idle(self) -> None:
        """The drained ones have nothing left to do."""
        for instance in self.fleet:
            if instance.state is State.DRAINING:
                self.fleet.apply(instance, Event.IDLE, "drained")

    def states(self) -> dict[str, str]:
        return {instance.url: instance.state for instance in self.fleet}


def listed(*texts: str, role: Role = Role.DECODE) -> Sequence[Listed]:
    return [(role, Endpoint.parse(text, "auto")) for text in texts]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_the_lists_are_the_fleet_and_a_change_is_a_difference(scene: Scene) -> None:
    assert scene.configure(A, B) and not scene.configure(A, B)
    scene.up(A), scene.up(B)
    version = scene.fleet.version
    assert scene.configure(A, C)
    assert scene.states() == {A: "READY", B: "DRAINING", C: "JOINING"}
    assert scene.instance(B).reason == "no longer listed by configured"
    assert scene.fleet.version > version
    assert scene.configure(A, B, C)
    assert scene.states() == {A: "READY", B: "JOINING", C: "JOINING"}, "it is wanted again before it has left"


def test_what_a_list_says_of_an_instance_can_change(scene: Scene) -> None:
    scene.configure(f"{A}?weight=2&host=h1&key=k1")
    scene.up(A)
    instance = scene.instance(A)
    instance.facts = {**instance.facts, "version": "1"}  # by the probe
    assert (instance.weight, instance.secret) == (2.0, "k1")
    version = scene.fleet.version
    assert scene.configure(A)
    assert (instance.weight, instance.secret, instance.facts) == (1.0, None, {"version": "1"})
    assert instance.state is State.READY and scene.fleet.version == version + 1


@pytest.mark.parametrize(("text", "role"), [(A, Role.PREFILL), (f"vllm+{A}", Role.DECODE)])
def test_another_role_or_dialect_is_another_engine(scene: Scene, text: str, role: Role) -> None:
    scene.configure(f"native+{A}")
    scene.up(A)
    before = scene.instance(A)
    assert scene.configure(text, role=role)
    assert before.state is State.GONE and scene.gone == [A]
    assert scene.instance(A).state is State.JOINING and scene.instance(A).role is role
    assert not scene.fleet.held


def test_who_is_behind_a_name_comes_and_is_drained_when_it_goes(scene: Scene) -> None:
    scene.configure(f"{NAME}?weight=3&rack=r")
    assert scene.states() == {} and scene.find(A, B) and not scene.find(B, A)
    assert scene.instance(A).weight == 3.0 and scene.instance(A).facts == {"labels": {"rack": "r"}}
    scene.up(A), scene.up(B)
    assert scene.find(B)
    assert scene.states() == {A: "DRAINING", B: "READY"}
    assert scene.instance(A).reason == f"no longer listed by {NAME}"
    assert not scene.find(A, name="dns+http://other:80"), "nobody asked for that name"


def test_an_instance_stays_while_any_source_lists_it(scene: Scene) -> None:
    scene.configure(NAME, f"{A}?weight=2")
    scene.find(A)
    scene.up(A)
    assert scene.instance(A).sources == {CONFIGURED, NAME}
    assert scene.instance(A).weight == 2.0, "a name says nothing of those who are listed by themselves"
    assert not scene.find() and scene.states() == {A: "READY"}
    scene.find(A)
    scene.configure(NAME)
    assert scene.states() == {A: "READY"}
    scene.configure()
    assert scene.states() == {A: "DRAINING"}, "the name is no source any more"


def test_a_name_with_another_role_is_told_once_and_changes_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.configure(NAME)
    scene.register(A, role=Role.PREFILL)
    assert not scene.find(A) and not scene.find(A)
    assert scene.instance(A).role is Role.PREFILL and scene.instance(A).sources == {REGISTERED}
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"{NAME} lists {A} as decode, but it is prefill"
    ]


def test_heartbeats_keep_an_instance_and_their_end_drains_it(scene: Scene) -> None:
    assert scene.register(A, until=10.0)
    scene.up(A)
    assert not scene.membership.expire(9.0)
    assert scene.register(A, until=20.0) and scene.states() == {A: "READY"}
    assert not scene.membership.expire(19.0)
    assert scene.membership.expire(20.0)
    assert scene.states() == {A: "DRAINING"} and scene.instance(A).reason == "its heartbeats have stopped"
    assert scene.register(A, until=30.0) and scene.states() == {A: "JOINING"}, "it was only late"
    assert not scene.membership.expire(25.0)


def test_without_heartbeats_it_is_registered_for_ever(scene: Scene) -> None:
    scene.register(A, until=10.0)
    scene.register(A, until=None)
    assert not scene.membership.expire(1e6)
    assert scene.states() == {A: "JOINING"}


def test_who_is_drained_by_an_admin_stays_away_while_it_is_listed(scene: Scene) -> None:
    scene.configure(NAME)
    scene.find(A)
    scene.up(A)
    scene.membership.drain(scene.instance(A), "drained by an admin")
    assert not scene.find(A) and scene.states() == {A: "DRAINING"}
    scene.idle()
    assert not scene.find(A) and scene.states() == {}
    assert scene.fleet.held == {A: {NAME}}
    scene.find()
    assert scene.fleet.held == {}, "it was taken away"
    assert scene.find(A) and scene.states() == {A: "JOINING"}


def test_removing_is_at_once_and_registering_ends_a_hold(scene: Scene) -> None:
    scene.configure(A)
    scene.up(A)
    assert scene.membership.remove(A) is not None and scene.membership.remove(A) is None
    assert scene.gone == [A] and not scene.configure(A) and scene.states() == {}
    assert scene.register(A, until=None)
    assert scene.instance(A).sources == {CONFIGURED, REGISTERED} and not scene.fleet.held


def test_a_heartbeat_ends_no_hold_but_another_process_does(scene: Scene) -> None:
    scene.register(A, "first")
    scene.up(A)
    scene.membership.drain(scene.instance(A), "drained by an admin")
    assert scene.register(A, "first") and scene.states() == {A: "DRAINING"}
    scene.idle()
    assert not scene.register(A, "first") and scene.states() == {}
    assert scene.register(A, "second") and scene.states() == {A: "JOINING"}
    scene.membership.drain(scene.instance(A), "drained by an admin")
    scene.idle()
    assert scene.membership.expire(10.0) and not scene.fleet.held, "it is gone, and may come back"
    assert scene.register(A, "second")


def test_a_registration_cannot_change_a_role(scene: Scene) -> None:
    scene.configure(A)
    with pytest.raises(ValueError, match="already known as decode"):
        scene.register(A, role=Role.ENCODE)
    assert repr(scene.membership) == "<Membership <Fleet decode 10.0.0.1:80 JOINING>, 0 held>"


def test_a_heartbeat_with_another_role_has_the_engine_asked(scene: Scene) -> None:
    scene.register(A, "first", role=Role.DECODE)
    scene.up(A)
    assert scene.register(A, "first", role=Role.DECODE) and scene.states() == {A: "READY"}
    assert scene.register(A, "first", role=Role.PREFILL) and scene.states() == {A: "DOWN"}
    instance = scene.instance(A)
    assert (instance.role, instance.reason) == (Role.DECODE, "it says that it is prefill now")
    instance.turn(Role.PREFILL)
    scene.up(A)
    assert scene.register(A, "first", role=Role.PREFILL) and scene.states() == {A: "READY"}
    assert scene.register(A, "second", role=Role.DECODE) and scene.states() == {A: "DOWN"}, "started again"


STEPS = st.one_of(
    st.tuples(st.just("configure"), st.sets(st.sampled_from([A, B, C]))),
    st.tuples(st.just("find"), st.sets(st.sampled_from([A, B, C]))),
    st.tuples(st.sampled_from(["register", "drain", "remove", "idle"]), st.sampled_from([A, B, C])),
)


@given(st.lists(st.tuples(st.integers(0, 1), STEPS), max_size=30))
def test_any_worker_may_go_on_where_another_stopped(steps: list[tuple[int, tuple[str, set[str] | str]]]) -> None:
    memory, beats = bytearray(roster.SIZE), bytearray(heartbeats.SIZE)
    fleets = [Roster(memory), Roster(memory)]
    workers = [Membership(fleet, Heartbeats(beats)) for fleet in fleets]
    for worker in workers:
        worker.follow(listed(NAME))
    lists: dict[str, set[str]] = {CONFIGURED: set(), NAME: set(), REGISTERED: set()}
    out: set[str] = set()  # held by an admin
    for who, (what, about) in steps:
        worker, fleet = workers[who], fleets[who]
        if isinstance(about, set):
            lists[CONFIGURED if what == "configure" else NAME] = about
            if what == "configure":
                worker.configure(listed(NAME, *about))
            else:
                worker.found(NAME, [url.removeprefix("http://") for url in about])
        elif what == "register":
            lists[REGISTERED].add(about)
            out.discard(about)
            worker.register(Role.DECODE, Endpoint.parse(about, "auto"), "1", None)
        elif what == "idle":
            for instance in fleet:
                if instance.state is State.DRAINING:
                    fleet.apply(instance, Event.IDLE, "drained")
        elif (known := fleet.get(about)) is not None:
            if known.state is not State.DRAINING or known.sources:
                out.add(about)
            if what == "drain":
                worker.drain(known, "by an admin")
            else:
                worker.remove(about)
        out &= set().union(*lists.values())
        wanted = set().union(*lists.values()) - out
        for view in fleets:
            assert {i.url for i in view if i.state is not State.DRAINING} == wanted
            assert view.held.keys() == out
            for instance in view:
                assert instance.sources == {name for name, urls in lists.items() if instance.url in urls}


async def test_another_configuration_changes_the_fleet_and_no_request_notices() -> None:
    async with deployment("2b", probe_interval=0.02) as d, Language() as late:
        leaving, staying = d.combined
        gate = leaving.gate = staying.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(4)]
        await leaving.until(lambda: leaving.running == 2)
        texts = [f"{staying.url}?weight=2", f"{late.url}?rack=r1"]
        d.proxy.go_by(d.proxy.settings.model_copy(update={"decode_servers_urls": ",".join(texts)}))
        shown = {i["url"]: i for i in (await d.get("/instances")).json["instances"]}
        assert (shown[leaving.url]["state"], shown[staying.url]["state"]) == ("DRAINING", "READY")
        assert (shown[staying.url]["weight"], shown[late.url]["facts"]) == (2.0, {"labels": {"rack": "r1"}})
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 4
        await until(lambda: [i.url for i in d.proxy.fleet if i.state is State.READY] == [staying.url, late.url])
        assert (await d.post(chat())).status == 200 and len(leaving.calls) == 2
