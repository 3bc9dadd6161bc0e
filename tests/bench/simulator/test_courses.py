"""Requests on their way, and how their legs' ends come back to the proxy."""

from __future__ import annotations

import pytest

from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.faults import Fault, Kill
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.requests import Media, Request, Text
from bench.simulator.results import Results
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role

VISION = QWEN3_VL_30B.vision(H100)
ENCODERS = [
    Machine("http://fast", Role.ENCODE, Encoder(VISION, cache_bytes=0)),
    Machine("http://slow", Role.ENCODE, Encoder(VISION, cache_bytes=0), slowness=5.0),
]
ENGINE = Machine("http://pd", BOTH, Engine(QWEN3_VL_30B.language(H100, 4), prefix_tokens=100_000))


@pytest.mark.parametrize("apart", [False, True])
def test_rates_are_learnt_from_the_legs_of_every_role(apart: bool) -> None:
    engine = Engine(QWEN3_VL_30B.language(H100, 4))
    split = [Machine("http://p", Role.PREFILL, engine), Machine("http://d", Role.DECODE, engine)]
    simulation = Simulation([*ENCODERS, *(split if apart else [ENGINE])], "round_robin")
    for number in range(40):
        simulation.offer(Request((Media(str(number), 1280, 720), Text(10)), 10), 1.0 * number)
    simulation.run()
    rates = simulation.balancer.rates
    encode = rates[Role.ENCODE]
    assert 4 < encode.seconds("http://slow") / encode.seconds("http://fast") < 6
    for role in (Role.PREFILL, Role.DECODE) if apart else (BOTH,):
        (instance,) = simulation.fleet.ready(role)
        assert rates[role].shown(instance.url)["observations"] >= 10


def test_an_image_that_comes_again_is_a_hit_and_its_prompt_is_not_computed_again() -> None:
    warm = Machine("http://e", Role.ENCODE, Encoder(VISION))
    simulation = Simulation([warm, ENGINE], "round_robin")
    request = Request((Text(5000, "instructions"), Media("cat", 1280, 720)), 1)
    for number in range(2):
        simulation.offer(request, 10.0 * number)
    results = simulation.run()
    assert list(results["hits"]) == [0.0, 1.0]
    assert results["encode"][1] < results["encode"][0] / 5
    assert results["ttft"][1] < results["ttft"][0] / 2


def test_text_without_an_identity_is_like_no_other() -> None:
    simulation = Simulation([ENGINE], "round_robin")
    for number in range(2):
        simulation.offer(Request((Text(5000),)), 10.0 * number)
    results = simulation.run()
    assert results["ttft"][1] == pytest.approx(results["ttft"][0])


def images_apart(overlap: bool, *faults: Fault) -> Results:
    """A long text before one image, whose encoder takes longer than the text."""
    room_for_one = Engine(QWEN3_VL_30B.language(H100, 4), VISION, overlap=overlap, kv_tokens=20_000)
    engine = Machine("http://pd", BOTH, room_for_one)
    simulation = Simulation([ENCODERS[1], engine], "round_robin", faults=faults)
    simulation.offer(Request((Text(9000), Media("cat", 3840, 2160), Text(10)), 5), 0.0)
    results = simulation.run()
    assert simulation.balancer.ledger.leases() == 0
    return results


def test_with_overlap_the_text_before_an_image_is_computed_while_it_encodes() -> None:
    after, during = images_apart(False), images_apart(True)
    assert during["encode"][0] == after["encode"][0]
    text = QWEN3_VL_30B.language(H100, 4).prefill(9000, 0)
    assert after["ttft"][0] - during["ttft"][0] > 0.8 * text


def test_what_was_computed_for_an_image_that_never_came_is_given_up() -> None:
    results = images_apart(True, Kill("http://slow", at=0.5))
    assert results["ok"].all()
    assert results.paths == ["EPD"]
    assert results["ttft"][0] > 0.5 + VISION.cost(Media("cat", 3840, 2160)).gpu
