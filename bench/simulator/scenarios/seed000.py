"""Colocated beside encoders apart on as many H100s, 0.5 requests a second: the runs published with SGLang's EPD.

Each published column is one run of 32 requests with 720p images and at most one token of answer, at the rate achieved.
Here it is the mean of many such runs. Compared are means of E2E: the published TTFTs average zeros in for requests that
produced no token. Fitted to these four columns: the host's time per item, a request's time beside its stages, and the
time to receive embeddings. It is one set for both models; nothing is fitted per column.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from statistics import fmean, pstdev

import numpy as np

from bench.report import Report
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.links import PICKLED, everywhere
from bench.simulator.machines import Machine
from bench.simulator.models import H100, QWEN2_5_VL_7B, QWEN3_VL_30B, SGLANG_2025_HOST, Model
from bench.simulator.requests import Media, Request, Text
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role

REQUESTS = 32
RUNS = 400
OVERHEAD_S = 0.03
SIZE = (1280, 720)
WITHIN = 0.10


@dataclass(frozen=True, slots=True)
class Column:
    """One published run."""

    model: Model
    name: str
    encoders: int
    ranks: int
    duration: float
    text: int  # tokens of a request, in the mean
    images: Callable[[Random], int]
    e2e: float  # published seconds
    median: float

    @property
    def gpus(self) -> int:
        return self.encoders + self.ranks


def _eight(dice: Random) -> int:
    return 8


def _some(dice: Random) -> int:
    return dice.randint(1, 8)


COLUMNS = (
    Column(QWEN3_VL_30B, "colocated TP8", 0, 8, 71.10, 2266, _eight, 2.86513, 2.53016),
    Column(QWEN3_VL_30B, "4 encoders, TP4", 4, 4, 71.12, 2268, _eight, 1.46898, 1.40418),
    Column(QWEN2_5_VL_7B, "colocated TP4", 0, 4, 95.81, 2115, _some, 1.19123, 1.18716),
    Column(QWEN2_5_VL_7B, "3 encoders, TP1", 3, 1, 95.82, 2115, _some, 0.60972, 0.61181),
)


def machines(column: Column) -> list[Machine]:
    """A colocated engine's images take one host process and one GPU's time: it had no data-parallel encoding."""
    vision = column.model.vision(H100, SGLANG_2025_HOST)
    language = column.model.language(H100, column.ranks)
    engine = Engine(language, None if column.encoders else vision, overhead=OVERHEAD_S)
    encoders = [Machine(f"http://e{n}", Role.ENCODE, Encoder(vision)) for n in range(column.encoders)]
    return [*encoders, Machine("http://pd", BOTH, engine)]


def arrivals(column: Column, dice: Random) -> Iterator[tuple[float, Request]]:
    rate = REQUESTS / column.duration
    at = 0.0
    for number in range(REQUESTS):
        media = (Media(f"{number}.{n}", *SIZE) for n in range(column.images(dice)))
        yield at, Request((*media, Text(column.text)))
        at += dice.expovariate(rate)


def simulated(column: Column, runs: int) -> tuple[float, float, float]:
    """Seconds of E2E: mean and median of a run, in the mean over runs; and how far such a run's mean is from theirs."""
    means, medians = [], []
    for run in range(runs):
        simulation = Simulation(
            machines(column), {Role.ENCODE: "round_robin"}, seed=run, embedding_link=everywhere(PICKLED)
        )
        e2e = simulation.run(arrivals(column, Random(run))).served("e2e")
        means.append(float(e2e.mean()))
        medians.append(float(np.median(e2e)))
    return fmean(means), fmean(medians), pstdev(means)


def run(report: Report, arguments: argparse.Namespace) -> None:
    for column in COLUMNS:
        report.progress(f"{column.model.name} {column.name}")
        mean, median, spread = simulated(column, arguments.runs or RUNS)
        error = mean / column.e2e - 1
        report.row(
            model=column.model.name,
            deployment=column.name,
            gpus=column.gpus,
            published_e2e_ms=round(column.e2e * 1e3),
            simulated_e2e_ms=round(mean * 1e3),
            error_percent=round(100 * error, 1),
            published_median_ms=round(column.median * 1e3),
            simulated_median_ms=round(median * 1e3),
            spread_percent=round(100 * spread / mean, 1),
        )
        report.bar(f"{column.model.name} {column.name}: error of mean E2E", abs(error), WITHIN)
