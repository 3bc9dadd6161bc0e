"""Whole runs: the live planner decides, simulated engines answer."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine, SimulatedEngine
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.requests import Media, Request, Text
from bench.simulator.results import COLUMNS
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role

VISION = QWEN3_VL_30B.vision(H100)
LANGUAGE = QWEN3_VL_30B.language(H100, 4)
ENCODERS = [Machine(f"http://e{n}", Role.ENCODE, Encoder(VISION)) for n in range(3)]
COMBINED = [Machine(f"http://pd{n}", BOTH, Engine(LANGUAGE)) for n in range(2)]
APART = [
    Machine("http://p", Role.PREFILL, Engine(LANGUAGE)),
    Machine("http://d", Role.DECODE, Engine(LANGUAGE)),
]
COLOCATED = [Machine("http://pd", BOTH, Engine(LANGUAGE, VISION))]


def arrivals(seed: int, count: int = 200) -> Iterator[tuple[float, Request]]:
    dice, at = Random(seed), 0.0
    for number in range(count):
        media = [Media(f"{number}.{n}", 1280, 720) for n in range(dice.randint(0, 3))]
        yield at, Request((*media, Text(dice.randint(10, 500))), dice.randint(1, 50))
        at += dice.expovariate(10.0)


@pytest.mark.parametrize(
    ("machines", "paths"),
    [
        ([*ENCODERS, *COMBINED], {"E-PD", "PD"}),
        ([*ENCODERS, *APART], {"E-P-D", "P-D"}),
        (COLOCATED, {"EPD", "PD"}),
    ],
    ids=["E-PD", "E-P-D", "EPD"],
)
def test_every_request_is_served_and_nothing_stays_held(machines: list[Machine], paths: set[str]) -> None:
    simulation = Simulation(machines, "least_loaded")
    results = simulation.run(arrivals(1))
    assert len(results) == results["ok"].sum() == 200
    assert set(results.paths) == paths
    assert simulation.balancer.ledger.leases() == 0
    simulation.balancer.ledger.check()


def test_the_same_seed_tells_the_same_story() -> None:
    told = []
    for _ in range(2):
        results = Simulation([*ENCODERS, *COMBINED], "least_loaded", seed=7).run(arrivals(7))
        told.append([results[name].tobytes() for name in COLUMNS if name != "decision"])
    assert told[0] == told[1]


def test_what_is_offered_and_what_is_streamed_is_the_same() -> None:
    streamed = Simulation([*ENCODERS, *COMBINED], "least_loaded").run(arrivals(3))
    simulation = Simulation([*ENCODERS, *COMBINED], "least_loaded")
    for at, request in arrivals(3):
        simulation.offer(request, at)
    assert list(simulation.run()["e2e"]) == list(streamed["e2e"])


def test_a_text_request_alone_takes_what_its_engine_takes() -> None:
    simulation = Simulation(COMBINED, "round_robin")
    simulation.offer(Request((Text(1000),), 3), 1.0)
    results = simulation.run()
    prefill = LANGUAGE.prefill(1000, 0)
    assert results["ttft"][0] == pytest.approx(prefill)
    steps = LANGUAGE.step(1, 1001)[0] + LANGUAGE.step(1, 1002)[0]
    assert results["e2e"][0] == pytest.approx(prefill + steps)
    assert results["tpot"][0] == pytest.approx(steps / 2)
    assert results["encode"][0] == 0.0


def test_an_image_takes_encoding_transfer_and_prefill_in_turn() -> None:
    simulation = Simulation([*ENCODERS, *COMBINED], "round_robin")
    simulation.offer(Request((Media("cat", 1280, 720),)), 0.0)
    results = simulation.run()
    cost = VISION.cost(Media("cat", 1280, 720))
    assert results["encode"][0] == pytest.approx(cost.host + cost.gpu)
    assert results["encode_wait"][0] == pytest.approx(0.0)
    assert results["transfer"][0] == pytest.approx(1e-3 + 4 * cost.nbytes / 25e9)
    stages = results["encode"] + results["transfer"] + results["queue"] + LANGUAGE.prefill(cost.tokens, 0)
    assert results["ttft"][0] == pytest.approx(stages[0])


def test_progress_is_told() -> None:
    told: list[int] = []
    Simulation(COMBINED, "round_robin").run(((n * 1e-3, Request((Text(1),))) for n in range(50_001)), told.append)
    assert told == [50_000]


def test_a_request_that_never_ends_is_a_mistake_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(COMBINED, "round_robin")
    simulation.offer(Request((Text(1),)), 0.0)
    monkeypatch.setattr(SimulatedEngine, "prefill", lambda engine, generation: None)
    with pytest.raises(RuntimeError, match="0 of 1 requests ended"):
        simulation.run()
