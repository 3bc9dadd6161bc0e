"""What the proxy sees of a simulated request, and how its legs' ends come back to it."""

from __future__ import annotations

import pytest

from bench.simulator.courses import Pricing
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.requests import Media, Request, Text
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role
from proxy.vision import FAMILIES

VISION = QWEN3_VL_30B.vision(H100)
ENCODERS = [
    Machine("http://fast", Role.ENCODE, Encoder(VISION, cache_bytes=0)),
    Machine("http://slow", Role.ENCODE, Encoder(VISION, cache_bytes=0), slowness=5.0),
]
ENGINE = Machine("http://pd", BOTH, Engine(QWEN3_VL_30B.language(H100, 4), prefix_tokens=100_000))


def test_a_job_has_an_item_for_each_image_with_its_identity_and_predicted_size() -> None:
    pricing = Pricing(FAMILIES["qwen3_vl"])
    job = pricing.job(Request((Media("cat", 1280, 720), Text(50), Media("dog", 640, 480)), 20))
    assert [item.identity for item in job.items] == ["cat", "dog"]
    assert [item.index for item in job.items] == [0, 1]
    assert [item.tokens for item in job.items] == [880, 300]
    assert job.items[0].work > 3 * job.items[1].work
    assert job.items[0].nbytes == 880 * FAMILIES["qwen3_vl"].embedding_bytes
    assert (job.text_tokens, job.output_tokens) == (50, 20)


def test_rates_are_learnt_from_the_legs() -> None:
    simulation = Simulation([*ENCODERS, ENGINE], "round_robin")
    for number in range(40):
        simulation.offer(Request((Media(str(number), 1280, 720), Text(10))), 1.0 * number)
    simulation.run()
    rates = simulation.balancer.rates[Role.ENCODE]
    assert 4 < rates.seconds("http://slow") / rates.seconds("http://fast") < 6


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
