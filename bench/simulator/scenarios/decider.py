"""To encode apart or inline: the proxy's choice for each request, beside always and never, from light to heavy images.

One fleet: two encoders, and four engines that prefill and decode and could encode inline, each on an H100. Always:
images go to the encoders. Never: to the engines, and the encoders are idle. Decided: the proxy chooses. Loads are parts
of what the better of always and never could carry; in the mixture, requests of all kinds come in bursts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from bench.report import Report
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN3_VL_30B
from bench.simulator.requests import Media, Request, Text
from bench.simulator.simulation import Simulation
from bench.simulator.workloads import FULL_HD, HD, VGA, Arrival, Gallery, Size, Span, gamma
from proxy.core import BOTH, Role

REQUESTS = 4000
WARM = 0.1  # of the requests, in which rates are learnt: they are not counted
ENCODERS, ENGINES = 2, 4
TEXT, OUTPUT = (64, 512), 16
LOADS = (0.3, 0.7)
WITHIN = 0.03  # of the better of always and never

VISION, LANGUAGE = QWEN3_VL_30B.vision(H100), QWEN3_VL_30B.language(H100, 1)
MODES = ("always", "never", "decided")


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind: how many images, of which sizes."""

    images: Span
    mix: Mapping[Size, float]

    def seconds(self) -> float:
        """GPU time of encoding one request, in the mean."""
        size = sum(share * VISION.cost(Media("", *size)).gpu for size, share in self.mix.items())
        return size * sum(self.images) / 2

    def tokens(self) -> float:
        size = sum(share * VISION.cost(Media("", *size)).tokens for size, share in self.mix.items())
        return size * sum(self.images) / 2 + sum(TEXT) / 2


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    kinds: tuple[Kind, ...]  # equally many of each
    variation: float = 1.0  # of arrivals


LIGHT, MEDIUM, HEAVY = Kind((1, 1), {VGA: 1.0}), Kind((1, 2), {HD: 1.0}), Kind((2, 6), {FULL_HD: 1.0})
TEXT_ONLY = Kind((0, 0), {VGA: 1.0})
MIXTURE = Workload("mixture", (TEXT_ONLY, LIGHT, MEDIUM, HEAVY), variation=2.0)
WORKLOADS = (
    Workload("mostly text", (TEXT_ONLY, TEXT_ONLY, TEXT_ONLY, LIGHT)),
    Workload("one VGA", (LIGHT,)),
    Workload("1-2 720p", (MEDIUM,)),
    Workload("2-6 1080p", (HEAVY,)),
    MIXTURE,
)


def rate(workload: Workload, load: float) -> float:
    """Requests per second: `load` of what the better of always and never carries."""
    encode = float(np.mean([kind.seconds() for kind in workload.kinds]))
    tokens = float(np.mean([kind.tokens() for kind in workload.kinds]))
    answer = LANGUAGE.prefill(round(tokens), 0) + OUTPUT * LANGUAGE.step(4, round(4 * tokens))[0] / 4
    always = min(ENCODERS / encode, ENGINES / answer)
    return load * max(always, ENGINES / (encode + answer))


def machines(mode: str) -> list[Machine]:
    """What the proxy may use."""
    engine = Engine(LANGUAGE, vision=None if mode == "always" else VISION)
    encoders = () if mode == "never" else range(ENCODERS)
    return [
        *(Machine(f"http://e{n}", Role.ENCODE, Encoder(VISION)) for n in encoders),
        *(Machine(f"http://pd{n}", BOTH, engine) for n in range(ENGINES)),
    ]


def arrivals(workload: Workload, load: float, seed: int) -> Iterator[Arrival]:
    dice = np.random.default_rng(seed)
    galleries = [Gallery(dice, kind.mix) for kind in workload.kinds]
    for at in gamma(rate(workload, load), workload.variation, dice):
        which = int(dice.integers(len(galleries)))
        shown = galleries[which].show(int(dice.integers(*workload.kinds[which].images, endpoint=True)))
        media = (Media(f"{which}.{one.identity}", one.width, one.height) for one in shown)
        yield at, Request((Text(int(dice.integers(*TEXT))), *media), OUTPUT)


def simulated(workload: Workload, load: float, mode: str, number: int, seed: int = 1) -> tuple[float, float]:
    """Seconds of TTFT in the mean, and the part of the requests with images that were encoded inline."""
    results = Simulation(machines(mode), "affinity", seed=seed).run(islice(arrivals(workload, load, seed), number))
    later = np.argsort(results["arrival"], kind="stable")[int(WARM * number) :]
    pictured = float((results["items"] > 0).sum())
    return float(results["ttft"][later].mean()), results.share("EPD") * number / pictured if pictured else 0.0


def run(report: Report, arguments: argparse.Namespace) -> None:
    number = arguments.requests or REQUESTS
    for workload in WORKLOADS:
        for load in LOADS:
            report.progress(f"{workload.name}, load {load}")
            found = {mode: simulated(workload, load, mode, number) for mode in MODES}
            means = {mode: mean for mode, (mean, _) in found.items()}
            report.row(
                workload=f"{workload.name}, {load}",
                requests_per_second=round(rate(workload, load), 1),
                **{f"{mode}_ms": round(mean * 1e3, 1) for mode, mean in means.items()},
                decided_inline=round(found["decided"][1], 2),
            )
            tell(report, workload, load, means)


def tell(report: Report, workload: Workload, load: float, means: Mapping[str, float]) -> None:
    ratio = means["decided"] / min(means["always"], means["never"])
    limit = 1.0 if workload is MIXTURE else 1 + WITHIN
    report.bar(f"{workload.name}, load {load}: TTFT as decided, by the better of always and never", ratio, limit)
