"""Engines that die in the middle: what was there goes elsewhere, by the planner's own hand."""

from __future__ import annotations

import pytest

from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.faults import Fault, Kill, Slow
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.requests import Media, Request, Text
from bench.simulator.results import Results
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role, State

VISION = QWEN3_VL_30B.vision(H100)
LANGUAGE = QWEN3_VL_30B.language(H100, 4)


def encoders(count: int) -> list[Machine]:
    return [Machine(f"http://e{n}", Role.ENCODE, Encoder(VISION)) for n in range(count)]


def combined(count: int, inline: bool = False) -> list[Machine]:
    return [Machine(f"http://pd{n}", BOTH, Engine(LANGUAGE, VISION if inline else None)) for n in range(count)]


def ran(machines: list[Machine], *faults: Fault, requests: int = 100) -> tuple[Simulation, Results]:
    """100 requests with an image, 20 ms apart: two seconds."""
    simulation = Simulation(machines, "round_robin", faults=faults)
    for number in range(requests):
        simulation.offer(Request((Media(str(number), 1920, 1080), Text(50)), 10), 0.02 * number)
    results = simulation.run()
    assert simulation.balancer.ledger.leases() == 0
    simulation.balancer.ledger.check()
    return simulation, results


def test_a_killed_encoders_items_go_to_another() -> None:
    simulation, results = ran([*encoders(3), *combined(1)], Kill("http://e0", at=0.5))
    assert results["ok"].all()
    assert results["attempts"].sum() >= 1
    dead = simulation.fleet.get("http://e0")
    assert dead is not None
    assert dead.state is State.DOWN
    assert simulation.results.used["http://e0"] < simulation.results.used["http://e1"]
    lost = [str(n) for n in range(100) if "http://e0" in simulation.balancer.holders.holders(str(n))]
    assert all(float(number) * 0.02 < 0.5 for number in lost)


def test_without_another_encoder_a_request_fails_unless_engines_can_encode() -> None:
    _, failed = ran([*encoders(1), *combined(1)], Kill("http://e0", at=0.5))
    assert 0 < failed["ok"].sum() < 100
    assert all("encode" in error or "killed" in error for error in failed.errors)
    _, served = ran([*encoders(1), *combined(1, inline=True)], Kill("http://e0", at=0.5))
    assert served["ok"].all()
    assert {"E-PD", "EPD"} == set(served.paths)


def test_an_encoder_that_is_back_gets_work_again() -> None:
    simulation, results = ran([*encoders(2), *combined(1)], Kill("http://e0", at=0.1, until=0.2), requests=300)
    assert results["ok"].all()
    assert simulation.fleet.ready(Role.ENCODE) == [simulation.fleet.get("http://e0"), simulation.fleet.get("http://e1")]
    assert simulation.results.used["http://e0"] > 50


def test_what_was_not_answered_yet_is_prefilled_elsewhere_and_what_was_breaks() -> None:
    _, results = ran([*encoders(3), *combined(2)], Kill("http://pd0", at=1.0))
    broken = results["ok"] == 0
    assert 0 < broken.sum() < 20
    assert (results["ttft"][broken] > 0).all()
    assert (results["attempts"][~broken] > 0).any()
    assert all("engine_broken" in error for error in results.errors)


@pytest.mark.parametrize("dead", ["http://p0", "http://d0"])
def test_prefill_and_decode_apart_survive_either(dead: str) -> None:
    apart = [
        *(Machine(f"http://p{n}", Role.PREFILL, Engine(LANGUAGE)) for n in range(2)),
        *(Machine(f"http://d{n}", Role.DECODE, Engine(LANGUAGE)) for n in range(2)),
    ]
    _, results = ran([*encoders(3), *apart], Kill(dead, at=1.0))
    assert results["ok"].sum() > 80
    if dead == "http://p0":
        assert results["ok"].all()


def test_an_engine_is_slow_for_as_long_as_it_is_told() -> None:
    _, well = ran([*encoders(2), *combined(1)])
    _, slow = ran([*encoders(2), *combined(1)], Slow("http://e0", at=0.5, times=10.0, until=1.0))
    assert slow.mean("encode") > 1.5 * well.mean("encode")
    assert slow["encode"].min() == well["encode"].min()
