"""Throws inputs at every part of the proxy that reads what others send: none may crash it, or be answered with a 500.

Hypothesis draws inputs that are nearly right out of a grammar; each is then damaged at random some sixty times. What
must hold of every input is checked on the way: bytes that are neither lost nor changed wherever a stream was cut, a
JSON object for every engine, bounded looks into media, compressed bodies within their limit. A finding is shrunk, and
printed so that it can be kept as a test.

    python -m bench.fuzz --inputs 1000000 --json
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bench.fuzzing.mutation import mutated
from bench.fuzzing.peers import Connected
from bench.fuzzing.targets import Target, targets
from bench.report import Report, add_arguments

MUTATIONS = 60  # of each input that the grammar makes
ROUND = 250  # inputs of the grammar, after which Hypothesis forgets all that it has drawn: it keeps a tree of it
GROWTH_MB = 64.0  # of memory, between the first tenth of a target's inputs and its last
_PAGE = resource.getpagesize()


@dataclass(slots=True)
class Outcome:
    """What a target did with its inputs. `finding`: a traceback and the input, empty if there is none."""

    inputs: int = 0
    taken: int = 0
    seconds: float = 0.0  # in the target itself and in damaging what it gets
    grown_mb: float = 0.0
    finding: str = ""


class Found(Exception):
    """An input that broke a target, with what that raised as its cause."""

    def __init__(self, data: bytes) -> None:
        super().__init__(f"{len(data)} bytes: {data[:2000]!r}")


def run(target: Target, inputs: int, number: int) -> Outcome:
    """Give `target` that many inputs, those of run `number`; it ends with the first finding."""
    outcome, early = Outcome(), 0.0
    while outcome.inputs < inputs and not outcome.finding:
        left = -(-(inputs - outcome.inputs) // (1 + MUTATIONS))
        try:
            _round(target, min(left, ROUND), number, outcome)
        except Found as found:
            outcome.finding = "".join(traceback.format_exception(found.__cause__, limit=-6)) + str(found)
        number += 1
        if not early and outcome.inputs >= inputs / 10:
            early = resident_mb()
    outcome.grown_mb = max(0.0, resident_mb() - early)
    return outcome


def _round(target: Target, examples: int, number: int, outcome: Outcome) -> None:
    """Some of them. Raises Found, with the shortest input that was found to do the same."""

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(target.seeds(), st.integers(0, 1 << 32))
    def play(data: bytes, entropy: int) -> None:
        dice, began = Random(entropy), time.perf_counter()
        for turn in range(1 + MUTATIONS):
            one = data if turn == 0 else mutated(data, dice)
            outcome.inputs += 1
            try:
                outcome.taken += target.run(one, dice)
            except Exception as error:
                raise Found(one) from error
        outcome.seconds += time.perf_counter() - began

    play()


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1e6


def tell(report: Report, outcomes: dict[str, Outcome], wanted: int) -> None:
    for name, outcome in outcomes.items():
        report.row(
            target=name,
            inputs=outcome.inputs,
            taken_percent=round(100 * outcome.taken / outcome.inputs, 1),
            inputs_per_s=round(outcome.inputs / max(outcome.seconds, 1e-9)),
            grown_mb=round(outcome.grown_mb, 1),
            findings=int(bool(outcome.finding)),
        )
    report.bar("inputs", sum(outcome.inputs for outcome in outcomes.values()), wanted, ">=")
    report.bar("findings", sum(bool(outcome.finding) for outcome in outcomes.values()), 0)
    report.bar("memory grown by a target, MB", max(outcome.grown_mb for outcome in outcomes.values()), GROWTH_MB)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--targets", default="", help="some of them only, by name: request body,events,…")
    parser.add_argument("--seed", type=int, default=1, help="other numbers give other inputs")
    arguments = parser.parse_args(argv)
    logging.getLogger("proxy").setLevel(logging.ERROR)
    report = Report("fuzz")
    with closing(Connected()) as peers:
        every = targets(peers)
        chosen = [one for one in every if not arguments.targets or one.name in arguments.targets.split(",")]
        if not chosen:
            parser.error(f"--targets: none of {', '.join(one.name for one in every)}")
        weight = sum(one.share for one in chosen)
        outcomes = {}
        for one in chosen:
            outcomes[one.name] = run(one, -(-arguments.inputs * one.share // weight), arguments.seed)
            report.progress(f"{one.name}: {outcomes[one.name].inputs} inputs {outcomes[one.name].finding}")
    tell(report, outcomes, arguments.inputs)
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
