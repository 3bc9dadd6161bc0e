"""What each engine family's wire costs the proxy: bytes sent to each stage, and CPU per image request.

Scripted engines of each family, one of every stage, stand behind Triptych's proxy, and by turns behind the family's own
proxy, where the user has it:

- pip packages on PATH or in --peers-bin: vllm-router, sglang-router. They know no encoders: prefill gets the media.
- example scripts of the engines' repositories, as --script NAME=FILE, run by --script-python:
  vllm-epd (disagg_epd_proxy.py), ascend-epd (epd_load_balance_proxy_layerwise_server_example.py),
  ascend-p-first (load_balance_proxy_server_example.py).

Bytes are those of the bodies that engines have received, by requests. CPU is user and system time of the proxy's whole
process tree, by requests; one candidate works at a time, on a core of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import orjson
import uvloop

from bench.pictures import noise_file
from bench.report import Report, add_arguments
from bench.scripted import answers, usage
from bench.scripted.candidates import Candidate, Fleet, NotStarted, Options, found, free_port, launched, running
from bench.scripted.client import Client
from bench.scripted.load import NotServed, Workload, connected, drive
from deploy.processes import Child, StartError

STAGES = ("encode", "prefill", "decode")
TOKENS = 64
_SETTLE_S = 0.05
FOUR, ONE = "four 768 KB images, 64 tokens", "one 4 MB image, 64 tokens"

# The proxy's CPU by that of the family's own, at the most. SGLang's router looks at no image; the proxy decodes each,
# since a language server that cannot dies of it.
CPU_BY_OWN = {"vllm": 1.0, "ascend": 1.0, "sglang": 1.3}
NATIVE_MEDIA = 0.01  # of a request's bytes, at the most, that prefill and decode of our own engines get together


@dataclass(frozen=True, slots=True)
class Contender:
    """A proxy in front of engines of `family`; `own`: the family's own, started as its users do."""

    name: str
    family: str
    handoff: str = "auto"
    arguments: tuple[str, ...] = ()
    encoders: bool = True
    own: bool = False


OURS = (
    Contender("triptych push", "native", "push"),
    Contender("triptych pull", "native", "pull"),
    Contender("triptych", "vllm"),
    Contender("triptych, embeddings kept", "vllm", arguments=("--media-to-prefill", "never")),
    Contender("triptych", "ascend"),
    Contender("triptych, prefill first", "ascend", "pull"),
    Contender("triptych", "sglang", encoders=False),
)
ROUTERS = (
    Contender("vllm-router", "vllm", encoders=False, own=True),
    Contender("sglang-router", "sglang", encoders=False, own=True),
)
SCRIPTS = {
    "vllm-epd": Contender("vllm-epd", "vllm", own=True),
    "ascend-epd": Contender("ascend-epd", "ascend", own=True),
    "ascend-p-first": Contender("ascend-p-first", "ascend", encoders=False, own=True),
}


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the families' own proxies are."""

    options: Options
    scripts: Mapping[str, Path] = field(default_factory=dict)
    python: str = sys.executable


def workloads(scale: float = 1.0) -> list[Workload]:
    """Both of the benchmark; a `scale` under 1 makes them smaller for a trial."""
    clients = max(1, round(16 * scale))
    quarters = [noise_file(768 << 10, Random(seed)) for seed in range(4)]
    whole = [noise_file(4 << 20, Random(9))]

    def streamed(name: str, images: Sequence[bytes]) -> Workload:
        body = answers.request("bench", TOKENS, stream=True, size=900, images=images)
        return Workload(name, body, True, TOKENS, clients, 1)

    return [streamed(FOUR, quarters), streamed(ONE, whole)]


@dataclass(slots=True)
class Figures:
    """Of one contender and one workload, per request."""

    cpu: list[float] = field(default_factory=list)  # seconds, by repeat
    received: dict[str, float] = field(default_factory=dict)  # bytes, by stage


Results = dict[tuple[Contender, str], Figures]


@asynccontextmanager
async def engines(family: str) -> AsyncIterator[Fleet]:
    """One engine of each stage, in processes of their own. Raises StartError."""
    async with AsyncExitStack() as stack:
        urls = {}
        for role in STAGES:
            child = Child(f"{family}-{role}", "bench.scripted", ["--role", role, "--family", family])
            stack.push_async_callback(child.stop)
            urls[role] = (await child.start(timeout=30),)
        yield Fleet(urls["encode"], urls["prefill"], urls["decode"])


async def received(fleet: Fleet) -> dict[str, int]:
    """Bytes of bodies so far, by stage."""
    counted = {}
    for stage, (url,) in zip(STAGES, (fleet.encode, fleet.prefill, fleet.decode), strict=True):
        client = Client(url)
        answer = await client.post("/scripted", b"{}", timeout=10)
        counted[stage] = int(orjson.loads(answer.body)["received"])
        client.close()
    return counted


async def settled(fleet: Fleet) -> dict[str, int]:
    """`received` once nothing more comes: decode may have answered before prefill has read all."""
    last: dict[str, int] = {}
    while (counted := await received(fleet)) != last:
        last = counted
        await asyncio.sleep(_SETTLE_S)
    return counted


@asynccontextmanager
async def standing(contender: Contender, fleet: Fleet, peers: Peers) -> AsyncIterator[Candidate]:
    """`contender` in front of `fleet`, serving. Raises NotStarted."""
    if not contender.encoders:
        fleet = replace(fleet, encode=())
    with TemporaryDirectory(prefix="bench-") as folder:
        async with _started(contender, fleet, peers, Path(folder)) as candidate:
            yield candidate


def _started(contender: Contender, fleet: Fleet, peers: Peers, folder: Path) -> AbstractAsyncContextManager[Candidate]:
    if not contender.own:
        arguments = ("--dialect", contender.family, *contender.arguments)
        options = replace(peers.options, arguments=arguments)
        return running(f"triptych-{contender.handoff}", fleet, options)
    if contender.name not in SCRIPTS:
        return running(contender.name, fleet, peers.options)
    port = free_port()
    flags = _urls(fleet, port) if contender.family == "vllm" else _hosts(fleet, port)
    command = [peers.python, str(peers.scripts[contender.name]), *flags]
    return launched(contender.name, command, port, folder)


def _urls(fleet: Fleet, port: int) -> list[str]:
    """The flags of vLLM's script."""
    lists = {"encode": fleet.encode, "prefill": fleet.prefill, "decode": fleet.decode}
    flags = [part for role, urls in lists.items() for part in (f"--{role}-servers-urls", ",".join(urls) or "disable")]
    return [*flags, "--host", "127.0.0.1", "--port", str(port)]


def _hosts(fleet: Fleet, port: int) -> list[str]:
    """The flags of vLLM-Ascend's scripts; the one without encoders does not know theirs."""
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    for role, urls in (("encoder", fleet.encode), ("prefiller", fleet.prefill), ("decoder", fleet.decode)):
        if urls:
            ports = [str(urlsplit(url).port) for url in urls]
            flags += [f"--{role}-hosts", *["127.0.0.1"] * len(ports), f"--{role}-ports", *ports]
    return flags


async def measure(candidate: Candidate, workload: Workload, fleet: Fleet, figures: Figures) -> None:
    """One run of `workload` through `candidate`. Raises NotServed."""
    async with connected(candidate.url, workload.clients) as clients:
        pids, before, at = candidate.pids, await settled(fleet), usage.cpu_seconds(candidate.pids)
        count = len(await drive(clients, workload))
        figures.cpu.append((usage.cpu_seconds(pids) - at) / count)
    after = await settled(fleet)
    figures.received = {stage: (after[stage] - before[stage]) / count for stage in STAGES}


async def run(report: Report, contenders: Sequence[Contender], peers: Peers, repeats: int, scale: float) -> Results:
    """Measure all, family by family, those of one family in turns. One that cannot serve is left out."""
    theirs, ours = usage.cores()
    results: Results = defaultdict(Figures)
    loads = workloads(scale)
    with usage.pinned(ours):
        for family in dict.fromkeys(contender.family for contender in contenders):
            report.progress(family)
            mine = [contender for contender in contenders if contender.family == family]
            async with engines(family) as fleet:
                for number in range(repeats):
                    for contender in mine[number % len(mine) :] + mine[: number % len(mine)]:
                        with usage.pinned(theirs):
                            stack = AsyncExitStack()
                            candidate = await stack.enter_async_context(standing(contender, fleet, peers))
                        async with stack:
                            for workload in loads:
                                await measure(candidate, workload, fleet, results[contender, workload.name])
    return results


def tell(report: Report, results: Results, sizes: Mapping[str, int]) -> None:
    """Rows and bars; `sizes`: bytes of each workload's request. A bar against a proxy that is not here is left out."""
    for (contender, workload), figures in results.items():
        got = figures.received
        report.row(
            family=contender.family,
            proxy=contender.name,
            workload=workload,
            **{f"kb_to_{stage}": round(got[stage] / 1024) for stage in STAGES},
            sent_by_request=round(sum(got.values()) / sizes[workload], 2),
            cpu_ms_per_request=round(median(figures.cpu) * 1e3, 2),
        )
    for (contender, workload), figures in results.items():
        if not contender.own:
            _bars(report, contender, workload, figures, results, sizes[workload])


def _bars(report: Report, contender: Contender, workload: str, figures: Figures, results: Results, nbytes: int) -> None:
    if contender.family == "native":
        rest = figures.received["prefill"] + figures.received["decode"]
        name = f"{contender.name}: {workload}, bytes to prefill and decode by the request's"
        report.bar(name, rest / nbytes, NATIVE_MEDIA)
    limit = CPU_BY_OWN.get(contender.family, 1.0)
    for other, peer in results.items():
        if other[0].own and other[0].family == contender.family and other[1] == workload:
            ratio = median(mine / theirs for mine, theirs in zip(figures.cpu, peer.cpu, strict=True))
            report.bar(f"{contender.family}, {contender.name}: {workload}, CPU by {other[0].name}'s", ratio, limit)


def contenders(report: Report, families: Sequence[str], peers: Peers) -> list[Contender]:
    """Ours and the families' own that are here, of `families`."""
    routers = [router for router in ROUTERS if found(router.name, peers.options)]
    for router in ROUTERS:
        if router not in routers:
            report.progress(
                f"{router.name} is not installed: left out, with its bars (--peers-bin DIR tells where it is)"
            )
    return [one for one in (*OURS, *routers, *(SCRIPTS[name] for name in peers.scripts)) if one.family in families]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dialects", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--families", default="native,vllm,ascend,sglang", help="which to measure")
    parser.add_argument("--peers-bin", type=Path, metavar="DIR", help="where the routers are besides PATH")
    parser.add_argument("--script", action="append", default=[], metavar="NAME=FILE", help="a family's example proxy")
    parser.add_argument("--script-python", default=sys.executable, metavar="PYTHON", help="what runs the scripts")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each workload; medians are told")
    parser.add_argument("--scale", type=float, default=1.0, help="under 1: fewer requests, for a quick look")
    arguments = parser.parse_args(argv)
    scripts = {name: Path(file) for name, _, file in (entry.partition("=") for entry in arguments.script)}
    if unknown := scripts.keys() - SCRIPTS.keys():
        parser.error(f"--script: {sorted(unknown)[0]!r} is none of {', '.join(SCRIPTS)}")
    report = Report("dialects")
    peers = Peers(Options(arguments.peers_bin), scripts, arguments.script_python)
    try:
        chosen = contenders(report, arguments.families.split(","), peers)
        results = uvloop.run(run(report, chosen, peers, max(1, arguments.repeats), arguments.scale))
    except (NotStarted, NotServed, StartError) as error:
        print(f"dialects: {error}", file=sys.stderr)
        return 2
    tell(report, results, {workload.name: len(workload.body) for workload in workloads(arguments.scale)})
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
