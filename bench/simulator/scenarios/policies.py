"""Eight encoders and every balancing policy: how long a request waits until all of its images are encoded.

Requests show one to eight images, 60 % VGA, 25 % 720p, 10 % 1080p, 5 % 4K, to encoders of Qwen3-VL-30B on an H100 each
with a cache of 2 GB. With reuse, images come from a catalogue by Zipf's law, else each is a new one. The offered load
is the GPU time of all images, as if none were cached, by the time of the eight GPUs: with reuse it may exceed 1.
Prefill costs nothing here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from bench.report import Report
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B, Linear
from bench.simulator.requests import Media
from bench.simulator.results import Results
from bench.simulator.simulation import Simulation
from bench.simulator.workloads import MIXED, Arrival, Gallery, Shape, poisson, requests
from proxy.balancer import POLICIES
from proxy.core import BOTH, Role

REQUESTS = 6000
WARM = 0.25  # of the requests, by which caches have filled: they are not counted
ENCODERS = 8
OFFERED = (0.5, 0.8, 1.0, 1.2)
CATALOGUE, EXPONENT = 5000, 0.9
CACHE_BYTES = 2e9
IMAGES = (1, 8)
OURS = "affinity"
AHEAD = 1.5  # times, of the mean with reuse
WITHIN = 0.10  # of the best without

VISION = QWEN3_VL_30B.vision(H100)
INSTANT = Engine(Linear(kv_bytes=0, ranks=1, per_token=0.0))


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds until a request's images were encoded, and the part of the images that somebody had."""

    mean: float
    p99: float
    hits: float


def machines() -> list[Machine]:
    """An item's time is its own: encoders do not make small images wait for large ones of their batch."""
    encoder = Encoder(VISION, batch=1, cache_bytes=CACHE_BYTES)
    told = {"cache_tokens": int(CACHE_BYTES / VISION.tower.embedding_bytes())}
    return [
        *(Machine(f"http://e{n}", Role.ENCODE, encoder, told) for n in range(ENCODERS)),
        Machine("http://pd", BOTH, INSTANT),
    ]


def rate(offered: float) -> float:
    """Requests per second."""
    total = sum(MIXED.values())
    image = sum(share / total * VISION.cost(Media("", *size)).gpu for size, share in MIXED.items())
    return offered * ENCODERS / (image * sum(IMAGES) / 2)


def arrivals(offered: float, reuse: bool, seed: int) -> Iterator[Arrival]:
    dice = np.random.default_rng(seed)
    gallery = Gallery(dice, catalogue=CATALOGUE if reuse else 0, exponent=EXPONENT)
    return requests(poisson(rate(offered), dice), gallery, dice, Shape(IMAGES, output_tokens=(1, 1)))


def simulated(policy: str, offered: float, reuse: bool, number: int, seed: int = 1) -> Run:
    simulation = Simulation(machines(), {Role.ENCODE: policy}, seed=seed)
    return judged(simulation.run(islice(arrivals(offered, reuse, seed), number)))


def judged(results: Results) -> Run:
    """Of the requests that came after the first ones."""
    later = np.argsort(results["arrival"], kind="stable")[int(WARM * len(results)) :]
    encode = results["encode"][later]
    hits = results["hits"][later].sum() / results["items"][later].sum()
    return Run(float(encode.mean()), float(np.percentile(encode, 99)), float(hits))


def run(report: Report, arguments: argparse.Namespace) -> None:
    number = arguments.requests or REQUESTS
    for reuse in (True, False):
        found: dict[str, list[Run]] = {}
        for offered in OFFERED:
            report.progress(f"{'with' if reuse else 'without'} reuse, {offered} offered")
            for policy in POLICIES:
                one = simulated(policy, offered, reuse, number)
                found.setdefault(policy, []).append(one)
                report.row(
                    policy=policy,
                    images="again, by Zipf" if reuse else "all new",
                    offered=offered,
                    mean_ms=round(one.mean * 1e3, 1),
                    p99_ms=round(one.p99 * 1e3, 1),
                    hit_rate=round(one.hits, 3),
                )
        (tell_reuse if reuse else tell_new)(report, found)


def tell_reuse(report: Report, found: dict[str, list[Run]]) -> None:
    """The means over all loads: under little load every policy takes as long as encoding takes."""
    means = {policy: float(np.mean([one.mean for one in runs])) for policy, runs in found.items()}
    best = min((policy for policy in means if policy != OURS), key=means.__getitem__)
    report.bar(
        f"with reuse: mean encode time of {best}, the best other, by {OURS}'s", means[best] / means[OURS], AHEAD, ">="
    )


def tell_new(report: Report, found: dict[str, list[Run]]) -> None:
    """At the load where it is the furthest from the best."""
    ratios = [one.mean / min(runs[at].mean for runs in found.values()) for at, one in enumerate(found[OURS])]
    report.bar(f"all new: mean encode time of {OURS}, by the best", max(ratios), 1 + WITHIN)
