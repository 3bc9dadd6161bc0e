"""Colocated on 8 H20s beside 2 for encoding and 8 for language: the limits published with SGLang's EPD, per GPU.

Published is the highest rate at which TTFT stays under 4 s and time per output token under 100 ms, both in the mean,
and what they are there. Here both are simulated: TTFT and TPOT at the published throughput, and the highest rate that
keeps the two limits, which is the qps per GPU. Fitted to these eight times: each model's prefill per token and decode
step, the H20's rate of encoding, and the host's time for a large image (`models`); nothing is fitted per column.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import fmean

from bench.report import Report
from bench.simulator.encoders import Encoder
from bench.simulator.engines import Engine
from bench.simulator.machines import Machine
from bench.simulator.models import H20, QWEN2_5_VL_72B, QWEN3_VL_235B, SGLANG_2025_HOST, Model
from bench.simulator.requests import Media, Request, Text
from bench.simulator.simulation import Simulation
from proxy.core import BOTH, Role

REQUESTS = 256
RUNS = 24
SIDE, TEXT, OUTPUT = 2000, 1024, 300
RANKS = 8
TTFT_S, TPOT_S = 4.0, 0.1
OVERHEAD_S = 0.03
WITHIN = 0.15
STEPS = 9  # of the search for the highest rate: to a five hundredth


@dataclass(frozen=True, slots=True)
class Column:
    """One published deployment."""

    model: Model
    name: str
    encoder_gpus: int
    qps_per_gpu: float
    ttft: float
    tpot: float

    @property
    def gpus(self) -> int:
        return self.encoder_gpus + RANKS

    @property
    def rate(self) -> float:
        return self.qps_per_gpu * self.gpus


COLUMNS = (
    Column(QWEN2_5_VL_72B, "colocated TP8", 0, 0.06625, 3.82607, 0.07863),
    Column(QWEN2_5_VL_72B, "encoder TP2, TP8", 2, 0.07420, 3.63270, 0.09561),
    Column(QWEN3_VL_235B, "colocated TP8", 0, 0.1075, 3.73824, 0.09124),
    Column(QWEN3_VL_235B, "encoder TP2, TP8", 2, 0.141, 3.83158, 0.09534),
)


def machines(column: Column) -> list[Machine]:
    """The encoder's two GPUs are as fast as one: a vision tower gains nothing from tensor parallelism."""
    vision = column.model.vision(H20, SGLANG_2025_HOST)
    engine = Engine(
        column.model.language(H20, RANKS), None if column.encoder_gpus else vision, max_running=128, overhead=OVERHEAD_S
    )
    encoders = [Machine("http://e", Role.ENCODE, Encoder(vision))] if column.encoder_gpus else []
    return [*encoders, Machine("http://pd", BOTH, engine)]


def arrivals(rate: float, dice: Random) -> Iterator[tuple[float, Request]]:
    at = 0.0
    for number in range(REQUESTS):
        yield at, Request((Media(str(number), SIDE, SIDE), Text(TEXT)), OUTPUT)
        at += dice.expovariate(rate)


def simulated(column: Column, rate: float, runs: int) -> tuple[float, float]:
    """Seconds of TTFT and TPOT, in the mean over runs."""
    found = [Simulation(machines(column), "round_robin").run(arrivals(rate, Random(run))) for run in range(runs)]
    return fmean(results.mean("ttft") for results in found), fmean(results.mean("tpot") for results in found)


def highest_rate(column: Column, runs: int) -> float:
    """Requests per second with both limits kept; the same arrivals at every rate but for their pace."""
    low, high = 0.5 * column.rate, 1.5 * column.rate
    for _ in range(STEPS):
        rate = (low + high) / 2
        ttft, tpot = simulated(column, rate, runs)
        low, high = (rate, high) if ttft <= TTFT_S and tpot <= TPOT_S else (low, rate)
    return low


def run(report: Report, arguments: argparse.Namespace) -> None:
    runs = arguments.runs or RUNS
    for column in COLUMNS:
        report.progress(f"{column.model.name} {column.name}")
        ttft, tpot = simulated(column, column.rate, runs)
        qps = highest_rate(column, runs) / column.gpus
        row: dict[str, float] = {}
        for name, unit, digits, published, ours in (
            ("qps", "per_gpu", 4, column.qps_per_gpu, qps),
            ("ttft", "ms", 0, column.ttft * 1e3, ttft * 1e3),
            ("tpot", "ms", 1, column.tpot * 1e3, tpot * 1e3),
        ):
            error = ours / published - 1
            row[f"published_{name}_{unit}"] = round(published, digits)
            row[f"simulated_{name}_{unit}"] = round(ours, digits)
            row[f"{name}_error_percent"] = round(100 * error, 1)
            report.bar(f"{column.model.name} {column.name}: error of {name}", abs(error), WITHIN)
        report.row(model=column.model.name, deployment=column.name, gpus=column.gpus, **row)
