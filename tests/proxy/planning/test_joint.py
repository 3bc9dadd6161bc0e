"""Places chosen for a whole path, beside what trying all plans finds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.policy import Demand
from proxy.core import BOTH, Role
from proxy.planning.joint import Joint
from proxy.planning.links import Place
from proxy.planning.prospects import unique
from tests.support.fleets import KV, Labelled, job

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


@pytest.mark.parametrize(
    ("encoder", "reader", "decoder", "differ"),
    [
        ({}, {}, {}, False),
        ({"host": "a"}, {"host": "a"}, {"host": "a"}, False),
        ({"host": "a"}, {"host": "b"}, {"host": "b"}, True),
        ({"host": "a"}, {}, {"host": "a"}, True),
        ({"rack": "a"}, {"rack": "a"}, {"rack": "b"}, True),
    ],
)
def test_there_is_something_to_choose_where_labels_differ(
    encoder: dict[str, str], reader: dict[str, str], decoder: dict[str, str], differ: bool
) -> None:
    found = Labelled()
    found.add(E, 2, **encoder)
    found.add(P, 2, **reader)
    found.add(D, 2, **decoder)
    assert Joint(found.balancer, found.links).differ(found.pools(P)) is differ


def test_only_who_takes_part_counts() -> None:
    found = Labelled()
    found.add(E, host="a")
    found.add(BOTH, 2, host="b")
    joint = Joint(found.balancer, found.links)
    assert joint.differ(found.pools(BOTH)) and not joint.differ(found.pools(BOTH, encodes=False))


@given(st.integers(0, 1 << 30), st.lists(st.integers(100, 20_000), min_size=1, max_size=3), st.integers(1, 5_000))
def test_the_place_is_about_as_good_as_the_best_of_all_plans(seed: int, works: list[int], text: int) -> None:
    found, asked = Labelled.random(Random(seed)), job(*works, text=text)
    place = Joint(found.balancer, found.links).place(
        found.pools(P), unique(asked.items), Demand(asked.prompt_tokens), KV * asked.prompt_tokens
    )
    there = [instance for instance in found.fleet.ready(P) if Place.of(instance) == place]
    best = found.best(asked)
    reached = min(found.best(asked, instance) for instance in there)
    assert best <= reached <= best * (1.0001 if len(works) == 1 else 1.5)


def racks(count: int) -> Labelled:
    found = Labelled()
    for number in range(count):
        found.add(P, rack=f"r{number}")
        found.add(D, rack=f"r{number}")
    return found


def test_among_many_places_those_near_the_best_encoder_and_those_that_are_idle_are_looked_at() -> None:
    near = racks(40)
    near.add(E, rack="r31")
    embedding = job(1000, nbytes=1 << 20)

    def place(found: Labelled) -> Place:
        pools, demand = found.pools(P), Demand(embedding.prompt_tokens)
        return Joint(found.balancer, found.links).place(pools, embedding.items, demand, 0)

    assert place(near) == Place(rack="r31")
    idle = racks(40)
    idle.add(E)  # far from all
    for instance in idle.fleet.ready(P):
        if Place.of(instance) != Place(rack="r17"):
            idle.balancer.ledger.lease(instance, P, 1_000_000)
    assert place(idle) == Place(rack="r17")


def test_who_holds_an_embedding_is_near() -> None:
    found = Labelled()
    for rack in "abc":
        found.add(E, rack=rack, load=10_000)
        found.add(P, rack=rack)
        found.add(D, rack=rack)
    asked, pools = job(1000), found.pools(P)
    held = found.fleet.ready(E)[1]
    found.balancer.holders.placed(held.url, asked.items[0].identity, 1000)
    demand = Demand(asked.prompt_tokens)
    assert Joint(found.balancer, found.links).place(pools, asked.items, demand, 0) == Place.of(held) == Place(rack="b")


def test_without_encoders_the_kv_decides() -> None:
    found = Labelled()
    for number in range(20):
        found.add(P, rack=f"r{number}")
    found.add(D, rack="r13")
    asked = job(text=1000)
    pools, kv = found.pools(P, encodes=False), 1 << 30
    assert Joint(found.balancer, found.links).place(pools, (), Demand(1000), kv) == Place(rack="r13")
    assert asked.items == ()


def test_transfers_are_bytes_over_the_link() -> None:
    found = Labelled()
    found.add(E, rack="r", host="a")
    found.add(E, rack="r", host="b")
    found.add(E)
    joint, pools = Joint(found.balancer, found.links), found.pools(P)
    assert pools.encoders is not None
    links, place = found.links, Place(rack="r", host="a")
    seconds = [1e6 / links.host, 1e6 / links.rack, 1e6 / links.other]
    assert list(joint.transfer(pools.encoders, place, 1_000_000).values()) == pytest.approx(seconds)
    assert joint.seconds(place, Place(rack="r", host="b"), 1_000_000) == seconds[1]
    assert list(joint.at(pools.encoders, place)) == ["http://encode0"]
