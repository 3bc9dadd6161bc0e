"""A worker's place: what it shares with the others, who probes, what a dead one leaves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from proxy.advice.flow import Sum
from proxy.balancer.fleet import Event
from proxy.balancer.ledger import Ledger
from proxy.core import Role, State
from proxy.workers.crew import Crew, Seat
from tests.support.waiting import until

URL = "http://h:1"


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew.create(2)
    yield made
    made.remove()
    assert not made.folder.exists()
    os.close(made.segment.fd)


def seat(crew: Crew, worker: int, life: int = -1) -> Seat:
    return Seat(crew, worker, 80, life, lambda: None)


def test_the_folder_is_this_users_alone(crew: Crew) -> None:
    assert crew.folder.stat().st_mode & 0o077 == 0


def test_places_see_one_fleet_and_one_load(crew: Crew) -> None:
    one, other = seat(crew, 0), seat(crew, 1)
    assert repr(other) == "<Seat 1 of 2 on port 80>"
    ours, theirs = one.fleet(lambda *_: None), other.fleet(lambda *_: None)
    instance = ours.join(URL, Role.DECODE, "native")
    assert [i.url for i in theirs] == [URL]
    first, second = Ledger({}, one.board()), Ledger({}, other.board())
    first.lease(instance, Role.DECODE, 10)
    lease = second.lease(instance, Role.DECODE, 5)
    crew.lost(0)
    assert (second.load(URL), second.leases()) == (5, 1)
    lease.close()
    assert second.load(URL) == 0


def test_places_add_to_one_flow_beside_the_loads(crew: Crew) -> None:
    one, other = seat(crew, 0), seat(crew, 1)
    instance = one.fleet(lambda *_: None).join(URL, Role.DECODE, "native")
    lease = Ledger({}, one.board()).lease(instance, Role.DECODE, 10)
    for place in (one, other):
        place.flow().add(5.0, [(what, 2.0) for what in Sum])
    assert one.flow().sums(5.0) == other.flow().sums(5.0) == [4.0] * len(Sum)
    assert other.board().standing(lease.row).load == 10


class Clock:
    """Stands in for the probes and for discovery."""

    def __init__(self) -> None:
        self.runs = 0
        self.wakes = 0

    async def run(self) -> None:
        self.runs += 1
        await asyncio.Event().wait()

    def wake(self) -> None:
        self.wakes += 1


async def test_who_probes_hears_of_changes_and_tells_what_it_learned(crew: Crew) -> None:
    one, other = seat(crew, 0), seat(crew, 1)
    ours, theirs = one.fleet(lambda *_: None), other.fleet(lambda *_: None)
    clock = Clock()
    probing = asyncio.create_task(one.probe(clock, clock, clock))  # type: ignore[arg-type]
    await until(lambda: clock.runs == 3)
    instance = theirs.join(URL, Role.DECODE, "native")
    await until(lambda: clock.wakes == 1)
    known = ours.get(URL)
    assert known is not None
    known.reason = "it does not answer"
    await until(lambda: theirs.refresh() and instance.reason == "it does not answer")
    theirs.apply(instance, Event.HEALTHY, "healthy")
    await until(lambda: clock.wakes == 2)
    assert known.state is State.READY
    probing.cancel()
    await asyncio.wait([probing])
    assert crew.segment.claim(2), "another may probe now"


async def test_an_orphan_stops_and_tidies_up(crew: Crew) -> None:
    reading, writing = os.pipe()
    worker, orphaned = seat(crew, 0, reading), asyncio.Event()
    worker.leave()
    assert crew.folder.exists(), "the supervisor does that"
    worker.watch(orphaned.set)
    os.close(writing)
    async with asyncio.timeout(10):
        await orphaned.wait()
    worker.leave()
    assert not crew.folder.exists()
    os.close(reading)
