"""What deciding costs: a thousand instances, a million requests, and single decisions in small and large fleets.

Every second request shows an image; a fifth of the instances encode, three tenths prefill, half of them decode. All
times are this process's CPU time; that of the whole run has arrivals and simulated engines in it.

A decision is `Balancer.take`: an instance chosen and charged, among as many as there are of its role. Beside it stands
`Planner.draw`: a whole plan, with the legs of one image, in a fleet of as many. Each figure is the median over batches,
the sizes measured in turns; rates change and loads differ as in use.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from statistics import median
from time import perf_counter, process_time

import numpy as np

from bench.report import Report
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN2_5_VL_7B
from bench.simulator.parsing import Parser
from bench.simulator.requests import Media, Request, Text
from bench.simulator.simulation import Simulation
from bench.simulator.workloads import VGA, Arrival, Gallery, Shape, poisson, requests
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.core import Role
from proxy.media.vision import FAMILIES
from proxy.planning.plan import Holds

REQUESTS = 1_000_000
INSTANCES = 1000
SMALL = 10
PER_INSTANCE = 7.0  # requests per second: about 40 % of what the prefill engines carry, which are the busiest
SHAPE = Shape(images=(0, 1), text_tokens=(32, 128), output_tokens=(16, 64))
CATALOGUE = 100_000
LIMITS_US = {SMALL: 20.0, INSTANCES: 60.0}
MINUTES = 10.0

BATCHES, BATCH = 30, 100
OPEN = 4  # legs in work at each instance while decisions are measured

Batch = Callable[[int], float]
"""Takes so many decisions; the seconds they took."""


def machines(number: int) -> list[Machine]:
    """`number` of them, by role as above."""
    vision, language = QWEN2_5_VL_7B.vision(H100), QWEN2_5_VL_7B.language(H100, 1)
    encoders, prefills = number // 5, 3 * number // 10
    return [
        *(Machine(f"http://e{n}", Role.ENCODE, Encoder(vision)) for n in range(encoders)),
        *(Machine(f"http://p{n}", Role.PREFILL, Engine(language)) for n in range(prefills)),
        *(Machine(f"http://d{n}", Role.DECODE, Engine(language)) for n in range(number - encoders - prefills)),
    ]


def arrivals(number: int, seed: int = 1) -> Iterator[Arrival]:
    """For `number` instances."""
    dice = np.random.default_rng(seed)
    gallery = Gallery(dice, catalogue=CATALOGUE)
    return requests(poisson(number * PER_INSTANCE, dice), gallery, dice, SHAPE)


def run(report: Report, arguments: argparse.Namespace) -> None:
    report.progress("single decisions")
    measured = decisions()
    for (what, instances), seconds in measured.items():
        report.row(decision=what, instances=instances, microseconds=round(seconds * 1e6, 1))
    for instances, limit in LIMITS_US.items():
        slowest = max(seconds for (what, number), seconds in measured.items() if number == instances and "take" in what)
        report.bar(f"slowest take among {instances} instances, in us", slowest * 1e6, limit)
    whole(report, arguments.requests or REQUESTS)


def whole(report: Report, number: int) -> None:
    """The run of `number` requests."""
    began, cpu = perf_counter(), process_time()

    def progress(done: int) -> None:
        report.progress(f"{done:,} of {number:,} requests, {perf_counter() - began:.0f} s")

    results = Simulation(machines(INSTANCES), "affinity").run(islice(arrivals(INSTANCES), number), progress)
    seconds = process_time() - cpu
    report.row(
        requests=number,
        served=int(results["ok"].sum()),
        cpu_seconds=round(seconds, 1),
        wall_seconds=round(perf_counter() - began, 1),
        us_per_plan=round(float(np.median(results["decision"])) * 1e6, 1),
        ttft_ms=round(results.mean("ttft") * 1e3, 1),
        hit_rate=round(float(results["hits"].sum() / results["items"].sum()), 3),
    )
    report.bar("CPU minutes of a million requests", seconds / number * 1e6 / 60, MINUTES)


# ---- single decisions


def decisions() -> dict[tuple[str, int], float]:
    """Seconds by what is decided, and among how many instances."""
    deciding: dict[tuple[str, int], Batch] = {}
    for number in (SMALL, INSTANCES):
        for role in (Role.ENCODE, Role.PREFILL, Role.DECODE):
            deciding[f"take, {role.label}", number] = taking(role, number)
        deciding["draw", number] = drawing(number)
    measured: dict[tuple[str, int], list[float]] = {key: [] for key in deciding}
    for _ in range(BATCHES):
        for key, decide in deciding.items():
            measured[key].append(decide(BATCH) / BATCH)
    return {key: median(seconds) for key, seconds in measured.items()}


def taking(role: Role, number: int) -> Batch:
    """Legs of `role` among `number` instances; before a batch as many old ones end and are observed."""
    spec = machines(SMALL)[0].spec
    simulation = Simulation((Machine(f"http://i{n}", role, spec) for n in range(number)), "affinity")
    balancer, pool = simulation.balancer, Pool(simulation.fleet.ready(role))
    dice = np.random.default_rng(1)
    images = Gallery(dice, catalogue=CATALOGUE)
    leases = deque(balancer.take(role, pool, Demand(1000)) for _ in range(max(BATCH, OPEN * number)))

    def decide(batch: int) -> float:
        for _ in range(batch):
            ended = leases.popleft()
            ended.close()
            seconds = dice.uniform(0.5, 2.0) * ended.tokens * 2e-5
            balancer.rates[role].observe(ended.instance.url, ended.tokens, 0, seconds)
        shown = [(image.width * image.height // 1024, image.identity) for image in images.show(batch)]
        keyed = role is Role.ENCODE
        demands = [Demand(work, key if keyed else "", ready=0.01, room=work) for work, key in shown]
        began = process_time()
        leases.extend([balancer.take(role, pool, demand) for demand in demands])
        return process_time() - began

    return decide


def drawing(number: int) -> Batch:
    """Plans in a fleet of `number`; before a batch as many old requests end."""
    simulation = Simulation(machines(number), "affinity")
    draw, parser, numbers = simulation.planner.draw, Parser(FAMILIES["qwen2_5_vl"]), count()
    open_requests: deque[Holds] = deque(Holds() for _ in range(max(BATCH, OPEN * number // 3)))

    def decide(batch: int) -> float:
        for _ in range(batch):
            open_requests.popleft().close()
        jobs = [parser.job(Request((Media(f"{next(numbers)}", *VGA), Text(300)), 100)) for _ in range(batch)]
        holds = [Holds() for _ in range(batch)]
        began = process_time()
        for job, held in zip(jobs, holds, strict=True):
            draw(job, 0.0, held)
        seconds = process_time() - began
        open_requests.extend(holds)
        return seconds

    return decide
