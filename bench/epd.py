"""Stages apart beside all stages in every engine, with as many engines: real ones, of one core each, on this machine.

Every topology has a proxy and engines of its own, and gets the same requests, in turns: some with images, which are
different each time, and some of text alone, whose tokens ought not to wait for others' images. A request's times count
from when it was due; first tokens are those of requests that produced any. Each engine, with all its threads, is kept
to one core, the engines of a topology to all cores in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp

from bench.load.arrivals import Pattern, drive
from bench.load.asking import CHAT, Outcome, ask
from bench.load.questions import Mixture, Question, questions
from bench.load.results import block
from bench.report import Report, add_arguments
from deploy.deployment import Deployment, Topology
from deploy.processes import StartError
from deploy.up import FAMILIES, tiny_checkpoint

TOPOLOGIES = "2epd,1e1pd"
IMAGES = "1,2,4,8"
MODEL = "bench"
SIZES = ((640, 480), (480, 640))
WORDS = 60
TOKENS = 24
RATE = 2.5  # with 8 images that is about as much as two engines can do
SHARE = 0.5  # of requests that have images
PATIENCE_S = 120.0

PACE = 1.0
"""What stages apart are for: tokens of text come no more slowly for others' images than where each engine does it all.
How much sooner depends on the machine, and so does who is sooner with images."""


@dataclass(slots=True)
class Seen:
    """Of one topology and one number of images: all turns together."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Answers:
    """The first answer to every request, and how many others there were."""

    said: dict[bytes, int] = field(default_factory=dict)
    differing: int = 0

    def compare(self, question: Question, outcome: Outcome) -> None:
        if not outcome.error:
            self.differing += self.said.setdefault(question.body, outcome.digest) != outcome.digest


@dataclass(frozen=True, slots=True)
class Plan:
    """images: per request, of those that have any. rate: requests per second."""

    topologies: tuple[str, ...]
    images: tuple[int, ...]
    requests: int
    repeats: int
    rate: float
    mixture: Mixture


def deployment(model: Path, topology: str, verbose: bool) -> Deployment:
    common = ("--threads", "1", "--log-level", "warning", "--served-model-name", MODEL)
    return Deployment(
        model, Topology.parse(topology), engine_arguments=common, proxy_arguments=("--log-level", "warning"),
        verbose=verbose,
    )  # fmt: skip


def pin(pid: int, core: int) -> None:
    """Keep a process to one core: the threads it has, and by them those it will have."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


@asynccontextmanager
async def running(model: Path, topologies: Sequence[str], verbose: bool) -> AsyncIterator[dict[str, Deployment]]:
    """Raises StartError."""
    cores = sorted(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        found = {name: await stack.enter_async_context(deployment(model, name, verbose)) for name in topologies}
        for where in found.values():
            for number, child in enumerate(where.engines.values()):
                pin(child.pid, cores[number % len(cores)])
        yield found


async def turn(session: aiohttp.ClientSession, url: str, plan: Plan, images: int, seed: int, answers: Answers) -> Seen:
    """The requests of `seed` with up to `images` images, at the plan's rate."""
    asked: Iterator[Question] = questions(replace(plan.mixture, images=images), seed)
    seen = Seen()

    async def send(question: Question, due: float) -> Outcome:
        outcome = await ask(session, url + CHAT, question, due)
        answers.compare(question, outcome)
        return outcome

    pattern = Pattern(plan.requests, float("inf"), plan.rate, clients=0, seed=seed)
    seen.seconds = await drive(pattern, asked, send, seen.outcomes.append)
    return seen


async def measure(report: Report, model: Path, plan: Plan, verbose: bool = False) -> None:
    limits = aiohttp.ClientTimeout(total=PATIENCE_S)
    headers = {"content-type": "application/json"}
    answers = Answers()
    found = {(name, images): Seen() for name in plan.topologies for images in plan.images}
    async with (
        running(model, plan.topologies, verbose) as fleets,
        aiohttp.ClientSession(headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        for number in range(plan.repeats + 1):
            for images in plan.images:
                for name in plan.topologies[:: -1 if number % 2 else 1]:
                    report.progress(f"turn {number} of {plan.repeats}, {images} images, {name}")
                    seen = await turn(session, fleets[name].url, plan, images, number, answers)
                    if number:  # the first is a warm-up
                        found[name, images].outcomes += seen.outcomes
                        found[name, images].seconds += seen.seconds
    tell(report, found, answers)


def tell(report: Report, found: Mapping[tuple[str, int], Seen], answers: Answers) -> None:
    """A row for each topology, number of images and kind of request. The bar of pace is that of all topologies against
    the first, beside the most images."""
    paces: dict[str, float] = {}
    most = max(images for _, images in found)
    for (name, images), seen in found.items():
        for kind in ("image", "text"):
            outcomes = [outcome for outcome in seen.outcomes if outcome.kind == kind]
            if not outcomes:
                continue
            row = block(outcomes, seen.seconds)
            report.row(topology=name, images=images if kind == "image" else 0, beside=images, **row)
            if kind == "text" and images == most and row["tpot mean"]:
                paces[name] = row["tpot mean"]
    every = [outcome for seen in found.values() for outcome in seen.outcomes]
    report.bar("requests not served", sum(bool(outcome.error) for outcome in every), 0)
    report.bar("answers that differ", answers.differing, 0)
    base, *others = paces
    for name in others:
        said = f"text beside {most} images: time per token, {name} / {base}"
        report.bar(said, paces[name] / paces[base], PACE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.epd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", default=TOPOLOGIES, help="of as many engines each (default: %(default)s)")
    parser.add_argument("--images", default=IMAGES, help="per request that has any, in turn (default: %(default)s)")
    parser.add_argument("--image-share", type=float, default=SHARE, help="of requests (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=RATE, help="requests per second (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="in each turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="counted turns of each (default: %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl", help="of the tiny checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint of your own, instead")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of every process")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        plan = plan_of(arguments)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    report = Report("epd")
    try:
        asyncio.run(run(report, arguments, plan))
    except StartError as error:
        print(f"epd: {error}", file=sys.stderr)
        return 2
    return report.emit(arguments)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises ValueError and argparse.ArgumentTypeError."""
    names = tuple(arguments.topologies.split(","))
    sizes = {name: len(Topology.parse(name).engines()) for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError("compare as many engines: " + ", ".join(f"{name} has {size}" for name, size in sizes.items()))
    mixture = Mixture(MODEL, words=WORDS, tokens=TOKENS, share=arguments.image_share, sizes=SIZES)
    images = tuple(int(number) for number in arguments.images.split(","))
    return Plan(names, images, arguments.requests, arguments.repeats, arguments.rate, mixture)


async def run(report: Report, arguments: argparse.Namespace, plan: Plan) -> None:
    family = arguments.family
    model = arguments.model or await tiny_checkpoint(family, Path(".checkpoints") / family)
    await measure(report, model, plan, arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
