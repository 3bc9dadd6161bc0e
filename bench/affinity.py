"""What it is worth to choose encoders by what they hold: `affinity` beside policies that do not ask, on real engines.

Each policy has engines of its own on this machine, all alike: encoders, one engine that prefills and decodes, and the
proxy before them. A few clients ask about one picture after another, drawn by Zipf's law from more pictures than one
encoder's cache holds, and fewer than all caches hold together. The policies take turns and get the same questions in
each; the first turn asks about every picture before, to fill the caches, and is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from bench.pictures import image_file, image_part
from bench.report import Report, add_arguments
from bench.scripted.load import NotServed
from deploy.deployment import Deployment, Topology
from deploy.processes import StartError
from deploy.up import tiny_checkpoint

CHOSEN = "affinity"
OTHERS = "round_robin,least_loaded"
FAMILY, MODEL = "qwen3_vl", "tiny"
ENCODERS = 3
SIZES = ((640, 480), (480, 640), (800, 384), (384, 800))  # 1,200 patches and 300 tokens each
EMBEDDING_BYTES = 300 * 3 * 256 * 4  # of a picture: tokens, each with two deepstack levels, of a tiny model in float32
PICTURES = 30
HELD = 12  # that one encoder's cache has room for: somewhat more than its share, since shares differ
SKEW = 0.8  # the k-th picture is asked about in proportion to 1 / k ** SKEW
CLIENTS = 2  # as many as the cores that this is made for
TOKENS = 4
PATIENCE_S = 60.0

# Bars.
HITS = 1.3
"""All pictures fit into all caches, and the 12 asked about most make 70 % of the questions: the most that caches which
all hold the same can have. So this would be 1.42 at the least if each picture kept to one encoder; a tenth less is for
shares that are larger than a cache, and for pictures that the neighbour of a busy encoder encodes again."""
FIRST_TOKEN = 1.0
"""How much sooner the first token comes depends on the machine: on how dear encoding is beside prefill. Never later."""


@dataclass(slots=True)
class Turn:
    """What clients and encoders measured in one turn of one policy. Seconds."""

    first: list[float] = field(default_factory=list)  # to the first token, by question
    items: int = 0
    held: int = 0  # of the items: cached, or being encoded already
    encode: float = 0.0  # from item to embedding, in the mean
    tower: float = 0.0  # in the model, all together


@dataclass(slots=True)
class Answers:
    """The first answer to every question, and how many later ones were others."""

    said: dict[int, str] = field(default_factory=dict)
    differing: int = 0

    def compare(self, picture: int, text: str) -> None:
        self.differing += self.said.setdefault(picture, text) != text


def deployment(model: Path, policy: str, verbose: bool) -> Deployment:
    engines = ("--dtype", "float32", "--threads", "1", "--log-level", "warning", "--served-model-name", MODEL)
    return Deployment(
        model,
        Topology(encode=ENCODERS, both=1),
        engine_arguments=engines,
        role_arguments={
            "encode": ("--cache-bytes", str(HELD * EMBEDDING_BYTES)),
            "both": ("--kv-blocks", "512", "--no-prefix-cache"),  # encoders alone are compared
        },
        proxy_arguments=("--policy", f"encode={policy}", "--log-level", "warning"),
        verbose=verbose,
    )


def catalogue() -> list[bytes]:
    """The request about each picture, the one asked about most first."""
    files = [image_file(*SIZES[number % len(SIZES)], seed=number) for number in range(PICTURES)]
    text = {"type": "text", "text": "What is this?"}
    wanted = {"max_tokens": TOKENS, "temperature": 0, "stream": True}
    return [
        orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": [image_part(file), text]}], **wanted})
        for file in files
    ]


def draw(count: int, dice: random.Random) -> list[int]:
    """The pictures of `count` questions."""
    weights = list(accumulate(1 / rank**SKEW for rank in range(1, PICTURES + 1)))
    return dice.choices(range(PICTURES), cum_weights=weights, k=count)


class Fleet:
    """A policy's deployment, seen from outside."""

    def __init__(self, where: Deployment, session: aiohttp.ClientSession) -> None:
        self._where = where
        self._session = session

    async def turn(self, pictures: Sequence[int], requests: Sequence[bytes], answers: Answers) -> Turn:
        """Ask about `pictures`, `CLIENTS` questions at once. Raises NotServed."""
        before, left, turn = await self._counted(), iter(pictures), Turn()

        async def client() -> None:
            for picture in left:
                text, seconds = await self._ask(requests[picture])
                answers.compare(picture, text)
                turn.first.append(seconds)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        tell_encoders(turn, before, await self._counted())
        return turn

    async def _ask(self, request: bytes) -> tuple[str, float]:
        """The text of the answer, and seconds to its first token. Raises NotServed."""
        text, first, done, began = "", None, False, time.perf_counter()
        url, headers = f"{self._where.url}/v1/chat/completions", {"Content-Type": "application/json"}
        async with self._session.post(url, data=request, headers=headers) as response:
            if response.status != 200:
                raise NotServed(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                first = first or time.perf_counter() - began
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    done = True
                elif data:
                    text += said(orjson.loads(data))
        if first is None or not done:
            raise NotServed(f"the stream ended after {text!r}")
        return text, first

    async def _counted(self) -> dict[str, float]:
        """What the encoders have counted until now, over all of them."""
        totals: dict[str, float] = {}
        for encoder in self._where.role("encode"):
            async with self._session.get(f"{encoder.url}/metrics") as response:
                for name, value in samples(await response.text()):
                    totals[name] = totals.get(name, 0.0) + value
        return totals


def said(event: Mapping[str, Any]) -> str:
    """The text that an event adds. Raises NotServed."""
    if not event.get("choices"):
        raise NotServed(f"an event of a stream says {event}")
    return event["choices"][0]["delta"].get("content") or ""


def samples(exposition: str) -> Iterator[tuple[str, float]]:
    """Values by name; of the cache's counter by result."""
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == "triptych_encode_cache_total":
                yield sample.labels["result"], sample.value
            elif not sample.labels:
                yield sample.name, sample.value


def tell_encoders(turn: Turn, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    def counted(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    turn.held = round(counted("hit") + counted("joined"))
    turn.items = turn.held + round(counted("miss"))
    turn.encode = counted("triptych_encode_item_seconds_sum") / counted("triptych_encode_item_seconds_count")
    turn.tower = counted("triptych_encode_forward_seconds_sum")


@asynccontextmanager
async def running(model: Path, policies: Sequence[str], verbose: bool) -> AsyncIterator[dict[str, Fleet]]:
    """A fleet for each policy. Raises StartError."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S)))
        yield {
            policy: Fleet(await stack.enter_async_context(deployment(model, policy, verbose)), session)
            for policy in policies
        }


async def measure(
    report: Report, model: Path, others: Sequence[str], questions: int, repeats: int, verbose: bool = False
) -> None:
    requests, answers = catalogue(), Answers()
    policies = [*others, CHOSEN]
    turns: dict[str, list[Turn]] = {policy: [] for policy in policies}
    async with running(model, policies, verbose) as fleets:
        for number in range(repeats + 1):
            pictures = [*(() if number else range(PICTURES)), *draw(questions, random.Random(number))]
            for policy in policies[:: -1 if number % 2 else 1]:
                report.progress(f"turn {number} of {repeats}, {policy}")
                turn = await fleets[policy].turn(pictures, requests, answers)
                if number:
                    turns[policy].append(turn)
    tell(report, turns, answers)


def hits(turns: Sequence[Turn]) -> float:
    """The share of items that encoders had."""
    return sum(turn.held for turn in turns) / sum(turn.items for turn in turns)


def tell(report: Report, turns: Mapping[str, Sequence[Turn]], answers: Answers) -> None:
    first = {policy: median(fmean(turn.first) for turn in taken) for policy, taken in turns.items()}
    for policy, taken in turns.items():
        every = [seconds for turn in taken for seconds in turn.first]
        report.row(
            policy=policy,
            questions=len(every),
            hit_percent=round(100 * hits(taken), 1),
            encode_ms=round(1e3 * median(turn.encode for turn in taken), 2),
            tower_s=round(median(turn.tower for turn in taken), 2),
            ttft_ms=round(1e3 * first[policy], 1),
            ttft_p99_ms=round(1e3 * quantiles(every, n=100, method="inclusive")[-1], 1),
        )
    for policy in [policy for policy in turns if policy != CHOSEN]:
        report.bar(f"hits / {policy}'s", hits(turns[CHOSEN]) / hits(turns[policy]), HITS, ">=")
        report.bar(f"mean time to first token / {policy}'s", first[CHOSEN] / first[policy], FIRST_TOKEN)
    report.bar("answers that differ", answers.differing, 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.affinity", description=__doc__.splitlines()[0])
    parser.add_argument("--beside", default=OTHERS, help="policies for encoders, comma-separated")
    parser.add_argument("--questions", type=int, default=60, help="in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each policy")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of every process")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    report = Report("affinity")
    try:
        asyncio.run(run(report, arguments))
    except (StartError, NotServed) as error:
        print(f"affinity: {error}", file=sys.stderr)
        return 2
    return report.emit(arguments)


async def run(report: Report, arguments: argparse.Namespace) -> None:
    model = await tiny_checkpoint(FAMILY, Path(".checkpoints") / FAMILY)
    others = arguments.beside.split(",")
    await measure(report, model, others, arguments.questions, arguments.repeats, arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
