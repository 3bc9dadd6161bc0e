"""A soak of real engines: load while engines are killed and frozen, every block counted every second.

A whole deployment of tiny models serves text and images, streamed and not, to clients that compare every answer with
what one `transformers` model says, and some of whom hang up. Engines are killed with -9 and started again, or stopped
for a while. Each second every engine compares its books with who holds what (`/audit`). At the end, idle, nothing may
be held by anybody: no block, no byte of an embedding, no transfer, no lease.

Options for engines go to all of them (`--engines "--transfer mooncake"`), or to those of one role (`--decode "…"`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from bench.load.asking import CHAT
from bench.pictures import image_file, image_part
from bench.reference import Reference, load_reference
from bench.report import Report, add_arguments
from bench.scripted.client import Client
from bench.scripted.usage import resident_bytes, tree
from bench.scripted.verdict import Verdict, judge
from deploy.deployment import Deployment, Topology
from deploy.processes import Child, StartError
from deploy.up import FAMILIES, tiny_checkpoint

ROLES = ("encode", "prefill", "decode", "both", "whole")
LANGUAGE = (
    "--max-batched-tokens",
    "96",
    "--kv-blocks",
    "256",
)  # a few requests at once, and their prefixes for a while
ENGINES = ("--dtype", "float32", "--threads", "1", "--log-level", "error", "--transfer-timeout", "5", "--grace", "2")
PROXY = ("--encode-timeout", "15", "--prefill-timeout", "15", "--first-token-timeout", "20", "--log-level", "error")
CLIENTS = 4
TOKENS = 16
LEAVES = 0.1  # share of requests whose client hangs up, within
LEAVES_AFTER_S = 1.0
PATIENCE_S = 60.0
STRIKE_EVERY_S = (4.0, 12.0)
KILLED = 0.5  # share of those struck; the others are frozen
FROZEN_S = (0.3, 4.0)
AUDIT_EVERY_S = 1.0
AUDIT_TIMEOUT_S = 10.0
SETTLE_S = 90.0
WARM_UP = 0.15  # share of the time
EXTRA_MEMORY = 0.15, 48.0  # a share, or so many MB for all engines together
MB = 1 << 20
CODE = re.compile(rb'"code":"(\w+)"')
WORDS = "The quick brown fox jumps over the lazy dog while the rain falls and nobody looks. "


@dataclass(frozen=True, slots=True)
class Case:
    """A request's content and the answer to it."""

    content: Any
    text: str

    def body(self, stream: bool) -> bytes:
        message = {"role": "user", "content": self.content}
        wanted = {"max_tokens": TOKENS, "temperature": 0, "stream": stream}
        return orjson.dumps({"model": "tiny", "messages": [message], **wanted})


@dataclass(slots=True)
class Tally:
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    errors: Counter[bytes] = field(default_factory=Counter)  # by their code
    lies: list[str] = field(default_factory=list)
    kills: int = 0
    freezes: int = 0
    audits: int = 0
    unbalanced: list[str] = field(default_factory=list)


def catalogue(reference: Reference, dice: random.Random) -> list[Case]:
    """Texts short and long, one image and several, the same images again in other company."""
    files = [image_file(*size, seed=n) for n, size in enumerate([(96, 64), (320, 160), (96, 192), (224, 224)] * 2)]
    cases = []
    for number in range(24):
        images = dice.sample(files, dice.choice((0, 0, 1, 1, 2, 3)))
        text = f"{WORDS * dice.choice((0, 1, 12))}Question {number}?"
        content: Any = [*map(image_part, images), {"type": "text", "text": text}] if images else text
        asked = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        cases.append(Case(content, reference.answer([{"role": "user", "content": asked}], images, TOKENS)))
    return cases


def deployment(model: Path, arguments: argparse.Namespace) -> Deployment:
    own = {role: shlex.split(getattr(arguments, role)) for role in ROLES}
    return Deployment(
        model,
        Topology.parse(arguments.topology),
        transfer=arguments.transfer,
        kv_handoff=arguments.kv_handoff,
        engine_arguments=(*ENGINES, "--served-model-name", "tiny", *shlex.split(arguments.engines)),
        role_arguments={role: (*(() if role == "encode" else LANGUAGE), *own[role]) for role in ROLES},
        proxy_arguments=(*PROXY, *shlex.split(arguments.proxy)),
        embedding_store=arguments.embedding_store,
        restarts=10_000,
        verbose=arguments.verbose,
    )


class Soak:
    """One deployment under load."""

    def __init__(self, where: Deployment, session: aiohttp.ClientSession, cases: Sequence[Case], seed: int) -> None:
        self._where = where
        self._session = session
        self._cases = cases
        self._dice = random.Random(seed)

    async def run(self, report: Report, seconds: float, tally: Tally, *, strike: bool = True) -> None:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(until, tally))
            if strike:
                group.create_task(self._strike(until, tally))
            group.create_task(self._audit(until, tally))
            group.create_task(_tell_progress(report, until, tally))

    async def _client(self, until: float, tally: Tally) -> None:
        client, dice = Client(self._where.url), self._dice
        while time.monotonic() < until:
            case, stream = dice.choice(self._cases), dice.random() < 0.7
            leave = dice.uniform(0, LEAVES_AFTER_S) if dice.random() < LEAVES else None
            answer = await client.post(CHAT, case.body(stream), timeout=PATIENCE_S, leave_after=leave)
            verdict = judge(answer, case.text, stream=stream)
            tally.verdicts[verdict] += 1
            if verdict is Verdict.LIE:
                tally.lies.append(f"{answer.status} {answer.body[-300:]!r}, not {case.text!r}")
            if verdict is Verdict.ERROR:
                tally.errors.update(CODE.findall(answer.body)[-1:])
            if verdict in (Verdict.ERROR, Verdict.ABORT):
                await asyncio.sleep(dice.uniform(0.05, 0.3))
        client.close()

    async def _strike(self, until: float, tally: Tally) -> None:
        """Kill or freeze one engine, and so on; at the end all run."""
        dice = self._dice
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, dice.uniform(*STRIKE_EVERY_S)))
            child = dice.choice([child for child in self._where.engines.values() if child.returncode is None])
            if dice.random() < KILLED:
                child.signal(signal.SIGKILL)
                tally.kills += 1
            else:
                await _frozen(child, dice.uniform(*FROZEN_S))
                tally.freezes += 1

    async def _audit(self, until: float, tally: Tally) -> None:
        """Each engine that answers at all must say that its books balance."""
        while time.monotonic() < until:
            await asyncio.gather(*(self._ask(name, child, tally) for name, child in self._where.engines.items()))
            await asyncio.sleep(AUDIT_EVERY_S)

    async def _ask(self, name: str, child: Child, tally: Tally) -> None:
        with suppress(aiohttp.ClientError, TimeoutError):  # it is dead, or stopped
            async with asyncio.timeout(AUDIT_TIMEOUT_S), self._session.get(f"{child.url}/audit") as response:
                said = await response.text()
                tally.audits += 1
                if response.status != 200:
                    tally.unbalanced.append(f"{name}: {said}")

    async def settled(self, seconds: float = SETTLE_S) -> tuple[dict[str, Any], float]:
        """What is still held by anybody when all should be at rest, and the engines' resident MB."""
        left: dict[str, Any] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while left := await held(self._session, self._where, away=True):  # noqa: ASYNC110 - nobody tells when
                    await asyncio.sleep(0.5)
        children = [child for child in self._where.engines.values() if child.returncode is None]
        return left, round(sum(resident_bytes(tree(child.pid)) for child in children) / MB, 1)


async def _frozen(child: Child, seconds: float) -> None:
    child.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        child.signal(signal.SIGCONT)


async def _tell_progress(report: Report, until: float, tally: Tally) -> None:
    while (left := until - time.monotonic()) > 0:
        await asyncio.sleep(min(15.0, left))
        seen = ", ".join(f"{verdict} {number}" for verdict, number in sorted(tally.verdicts.items()))
        report.progress(f"{tally.kills} kills, {tally.freezes} freezes, {tally.audits} audits: {seen}")


async def held(session: aiohttp.ClientSession, where: Deployment, away: bool = False) -> dict[str, Any]:
    """Everything that is not at rest, by process; empty when all is. `away`: an instance that is not READY counts too,
    for its engine may have come back unseen."""
    found: dict[str, Any] = {}
    for instance in (await _get(session, f"{where.url}/instances"))["instances"]:
        if instance["load"] or instance["leases"] or (away and instance["state"] != "READY"):
            found[f"proxy:{instance['url']}"] = instance
    for name, child in where.engines.items():
        try:
            busy = busy_parts(await _get(session, f"{child.url}/info"))
        except (aiohttp.ClientError, TimeoutError) as error:
            busy = {"unreachable": repr(error)}
        if busy:
            found[name] = busy
    return found


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
        return await response.json(content_type=None)


def busy_parts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine's `/info` says is still in use; an encoder's handles, readable for a while, do not count."""
    busy = {name: count for name, count in info["transfer"]["audit"].items() if count}
    if info["role"] == "encode":
        busy.pop("publications", None)
        return busy
    busy |= {name: info[name] for name in ("waiting", "running", "remote") if info[name]}
    if info["free_blocks"] != info["num_blocks"]:
        busy["blocks"] = info["num_blocks"] - info["free_blocks"]
    if info["embeddings"]["free"] != info["embeddings"]["capacity"]:
        busy["embeddings"] = info["embeddings"]
    return busy


async def soak(report: Report, model: Path, arguments: argparse.Namespace) -> None:
    report.progress("asking one transformers model for the answers")
    cases = catalogue(load_reference(model), random.Random(arguments.seed))
    seconds, calm, tally = arguments.minutes * 60, Tally(), Tally()
    limits = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with deployment(model, arguments) as where, aiohttp.ClientSession(timeout=limits) as session:
        where.keep_alive()
        run = Soak(where, session, cases, arguments.seed)
        await run.run(report, seconds * WARM_UP, calm, strike=False)
        before = await run.settled()
        await run.run(report, seconds * (1 - WARM_UP), tally)
        after = await run.settled()
    tell(report, arguments.topology, calm, tally, before, after)


def tell(
    report: Report,
    topology: str,
    calm: Tally,
    tally: Tally,
    before: tuple[dict[str, Any], float],
    after: tuple[dict[str, Any], float],
) -> None:
    """`calm`: of the part in which nobody was struck."""
    answered = sum(number for verdict, number in tally.verdicts.items() if verdict is not Verdict.LEFT)
    for line in itertools.chain(tally.lies[:5], tally.unbalanced[:5]):
        report.progress(f"wrong: {line}")
    for when, errors in (("before anybody was struck", calm.errors), ("later", tally.errors)):
        said = ", ".join(f"{code.decode()} {count}" for code, count in errors.most_common())
        report.progress(f"errors {when}: {said or 'none'}")
    if held := after[0]:
        report.progress(f"still held: {held}")
    report.row(
        topology=topology,
        requests=sum(tally.verdicts.values()),
        kills=tally.kills,
        freezes=tally.freezes,
        audits=tally.audits,
        **{str(verdict): tally.verdicts[verdict] for verdict in Verdict},
        served_share=tally.verdicts[Verdict.SERVED] / max(1, answered),
        rss_mb_before=before[1],
        rss_mb_after=after[1],
    )
    share, mb = EXTRA_MEMORY
    report.bar("answers that one model would not give", tally.verdicts[Verdict.LIE], 0)
    unserved = sum(calm.verdicts.values()) - calm.verdicts[Verdict.SERVED] - calm.verdicts[Verdict.LEFT]
    report.bar("requests not served before anybody was struck", unserved, 0)
    report.bar("hung", tally.verdicts[Verdict.HUNG], 0)
    report.bar("audits that did not balance", len(tally.unbalanced), 0)
    report.bar("parts that hold something at the end", len(held), 0)
    report.bar("engines' MB resident at the end", after[1], round(before[1] + max(before[1] * share, mb)))
    report.bar("audits", tally.audits, 1, ">=")
    report.bar("requests served", tally.verdicts[Verdict.SERVED], 1, ">=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, the warm-up included")
    parser.add_argument("--topology", default="2e1p1d", help="default: %(default)s")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl", help="of the tiny checkpoint")
    parser.add_argument("--transfer", default="shm", help="default: %(default)s")
    parser.add_argument("--kv-handoff", choices=("push", "pull"), default="push")
    parser.add_argument(
        "--embedding-store", default="", metavar="BYTES", help="with a store of that size beside the engines"
    )
    parser.add_argument("--engines", default="", metavar="FLAGS", help="for every engine")
    for role in ROLES:
        parser.add_argument(f"--{role}", default="", metavar="FLAGS", help=f"for engines of the role {role}")
    parser.add_argument("--proxy", default="", metavar="FLAGS", help="for the proxy")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of every process")
    arguments = parser.parse_args(argv)
    report = Report("soak")
    try:
        asyncio.run(_main(report, arguments))
    except (StartError, argparse.ArgumentTypeError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    return report.emit(arguments)


async def _main(report: Report, arguments: argparse.Namespace) -> None:
    model = await tiny_checkpoint(arguments.family, Path(".checkpoints") / arguments.family)
    await soak(report, model, arguments)


if __name__ == "__main__":
    sys.exit(main())
