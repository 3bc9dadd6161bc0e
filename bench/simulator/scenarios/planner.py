"""The advised split of eight engines into encode, prefill and decode, beside the best of all splits.

What a split carries is simulated: the highest rate at which the mean TTFT stays under a multiple of what it is in an
idle fleet, and the mean time per output token under a limit. Every split is tried, but for those whose engines, never
idle, would carry less than the best so far; one counts as better if it carries more by more than the search resolves.
The advice sees rates and what is offered, as `GET /plan` does, and no simulation.
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
from bench.simulator.requests import Media
from bench.simulator.simulation import Simulation
from bench.simulator.workloads import FULL_HD, HD, MIXED, VGA, Arrival, Gallery, Shape, Size, Span, poisson, requests
from proxy.advice.capacity import Carried, Offered, advise
from proxy.core import Role

ENGINES = 8
REQUESTS = 1200
WARM = 0.25  # of the requests: until decode batches are as large as they get
TTFT_TIMES = 2.5  # of the idle fleet's
TPOT_S = 0.025
RESOLVED = 0.03  # of a rate
WITHIN = 1  # engines, of each role

VISION, LANGUAGE = QWEN3_VL_30B.vision(H100), QWEN3_VL_30B.language(H100, 1)

Split = tuple[int, int, int]
"""Engines that encode, prefill, decode."""


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    images: Span
    mix: Mapping[Size, float]
    text_tokens: Span
    output_tokens: Span

    def per_image(self) -> tuple[float, float, float]:
        """Mean seconds of encoding one, their squared coefficient of variation, mean tokens."""
        shares = np.array(list(self.mix.values())) / sum(self.mix.values())
        costs = [VISION.cost(Media("", *size)) for size in self.mix]
        seconds = np.array([cost.gpu for cost in costs])
        mean = float(shares @ seconds)
        return mean, float(shares @ seconds**2) / mean**2 - 1, float(shares @ np.array([cost.tokens for cost in costs]))

    @property
    def number(self) -> float:
        return sum(self.images) / 2

    @property
    def prompt(self) -> float:
        return sum(self.text_tokens) / 2 + self.number * self.per_image()[2]

    @property
    def output(self) -> float:
        return sum(self.output_tokens) / 2


WORKLOADS = (
    Workload("long answers", (0, 1), {VGA: 1.0}, (64, 512), (200, 400)),
    Workload("long prompts", (0, 1), {HD: 1.0}, (3000, 5000), (32, 96)),
    Workload("mixed sizes", (1, 2), MIXED, (64, 512), (100, 300)),
    Workload("many images", (2, 6), {FULL_HD: 1.0}, (64, 512), (20, 60)),
)


def pace(workload: Workload) -> float:
    """Output tokens per second of one engine whose steps take TPOT_S."""
    kept = workload.prompt + workload.output / 2
    batch = 1
    while LANGUAGE.step(batch + 1, round((batch + 1) * kept))[0] <= TPOT_S:
        batch += 1
    return batch / TPOT_S


def works(workload: Workload) -> tuple[float, float, float]:
    """Seconds of an encoder, of a prefill and of a decode engine that one request takes."""
    encode = workload.number * workload.per_image()[0]
    return encode, LANGUAGE.prefill(round(workload.prompt), 0), workload.output / pace(workload)


def advised(workload: Workload) -> Split:
    """In seconds of work: a token of it is one that takes one second of one engine."""
    encode, prefill, decode = works(workload)
    offered = Offered(1.0, encode, prefill, decode, workload.per_image()[1])
    roles = (Role.ENCODE, Role.PREFILL, Role.DECODE)
    advice = advise(offered, Carried(dict.fromkeys(roles, 1), 1.0, 1.0, 1.0), ENGINES).advised
    return advice[Role.ENCODE], advice[Role.PREFILL], advice[Role.DECODE]


def splits() -> list[Split]:
    """All of them, at least one engine of each role."""
    return [(e, p, ENGINES - e - p) for e in range(1, ENGINES - 1) for p in range(1, ENGINES - e)]


def distance(one: Split, other: Split) -> int:
    """Engines of the role in which they differ the most."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


# ---- what a split carries


def machines(split: Split) -> list[Machine]:
    encoders, prefills, decodes = split
    engine = Engine(LANGUAGE)
    return [
        *(Machine(f"http://e{n}", Role.ENCODE, Encoder(VISION)) for n in range(encoders)),
        *(Machine(f"http://p{n}", Role.PREFILL, engine) for n in range(prefills)),
        *(Machine(f"http://d{n}", Role.DECODE, engine) for n in range(decodes)),
    ]


def arrivals(workload: Workload, rate: float) -> Iterator[Arrival]:
    dice = np.random.default_rng(1)
    shape = Shape(workload.images, workload.text_tokens, workload.output_tokens)
    return requests(poisson(rate, dice), Gallery(dice, workload.mix), dice, shape)


def times(workload: Workload, split: Split, rate: float, number: int) -> tuple[float, float]:
    """Mean seconds of TTFT, and per output token."""
    results = Simulation(machines(split), "affinity").run(islice(arrivals(workload, rate), number))
    later = np.argsort(results["arrival"], kind="stable")[int(WARM * number) :]
    return float(results["ttft"][later].mean()), float(np.nanmean(results["tpot"][later]))


def bound(workload: Workload, split: Split) -> float:
    """Requests per second if no engine were ever idle."""
    return min(count / seconds for count, seconds in zip(split, works(workload), strict=True))


class Search:
    """The highest rates of one workload's splits."""

    def __init__(self, workload: Workload, number: int) -> None:
        self._workload = workload
        self._number = number
        start = advised(workload)
        self._ttft = TTFT_TIMES * times(workload, start, 0.02 * bound(workload, start), number // 4)[0]

    def carries(self, split: Split, rate: float) -> bool:
        ttft, tpot = times(self._workload, split, rate, self._number)
        return ttft <= self._ttft and tpot <= TPOT_S

    def highest(self, split: Split, least: float) -> float:
        """Requests per second; 0 if it is not more than `least`."""
        most = bound(self._workload, split)
        if most <= least or (least > 0 and not self.carries(split, least)):
            return 0.0
        low, high = least, most
        while high - low > RESOLVED * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.carries(split, middle) else (low, middle)
        return low


def run(report: Report, arguments: argparse.Namespace) -> None:
    number = arguments.requests or REQUESTS
    for workload in WORKLOADS:
        report.progress(workload.name)
        search, ours = Search(workload, number), advised(workload)
        best, rate = ours, search.highest(ours, 0.0)
        own = rate
        for split in sorted(splits(), key=lambda split: (distance(split, ours), split)):
            found = search.highest(split, rate * (1 + RESOLVED)) if split != ours else 0.0
            if found:
                best, rate = split, found
        report.row(
            workload=workload.name,
            advised=_label(ours),
            best=_label(best),
            advised_rps=round(own, 2),
            best_rps=round(rate, 2),
        )
        report.bar(f"{workload.name}: engines between advised and best", distance(ours, best), WITHIN)


def _label(split: Split) -> str:
    return ":".join(map(str, split))
