"""What a proxy costs: CPU per request and per streamed token, time added to the first token, memory.

Triptych's proxy with both KV handoffs, nginx with one hop, and the routers of vLLM and SGLang (prefill and decode
apart) stand in front of the same fast scripted engines; so does `bare`, for text: a relay on asyncio and uvloop that
sends a request to prefill and decode and decides nothing, which is the least that any such proxy can cost. One
candidate works at a time, in turns within one run, on a core of its own; engines and load have another. What is
compared are ratios: the machine may be shared.

- CPU of a request: user and system time of the proxy's whole process tree over a run, by requests answered.
- CPU of a token: the streamed workload's CPU per request less the unstreamed one's, by 64 tokens.
- Added time to first token: the quantiles through the proxy less those of the same load straight to a decode engine.
- Memory: the tree's largest resident size while 64 requests with a 4 MB image each wait for their encoder or prefill.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import uvloop

from bench.report import Report, add_arguments
from bench.scripted import answers, usage
from bench.scripted.candidates import (
    BARE,
    HANDOFFS,
    PEERS,
    Candidate,
    Fleet,
    NotStarted,
    Options,
    found,
    known,
    running,
)
from bench.scripted.client import Client
from bench.scripted.load import NotServed, Workload, connected, drive
from deploy.processes import Child

TOKENS = 64
INTERVAL_S = 0.02
STREAM_S = TOKENS * INTERVAL_S
DIRECT = "direct"
HELD_REQUESTS = 64
HELD_S = 1.5  # so long do the first engines wait, that all requests of the memory run are there at once
MB = 1 << 20

TEXT, STREAM, FOUR, ONE = "text", "text, 64 tokens", "four 768 KB images, 64 tokens", "one 4 MB image, 64 tokens"

# Bars; the images' limit in seconds is for a machine on which nginx takes 2.5 to 4 ms, and moves with nginx elsewhere.
TOKEN_BY_NGINX = 1.1
IMAGES_BY_ROUTER = 1 / 3
IMAGES_MS, NGINX_MS = 7.0, (2.5, 4.0)
HELD_MB = HELD_REQUESTS * 4 * 2 + 100
ADDED_MS = {"median": 2.0, "p99": 8.0}


def workloads(scale: float = 1.0) -> list[Workload]:
    """The four of the benchmark; a `scale` under 1 makes them smaller for a trial."""

    def count(clients: int) -> int:
        return max(1, round(clients * scale))

    quarters = [answers.image(768 << 10, seed) for seed in range(4)]
    whole = [answers.image(4 << 20, 9)]

    def streamed(name: str, clients: int, each: int, images: Sequence[bytes] = ()) -> Workload:
        body = answers.request("bench", TOKENS, stream=True, size=900, images=images)
        return Workload(name, body, True, TOKENS, count(clients), each, spread=STREAM_S)

    text = answers.request("bench", TOKENS, stream=False, size=900)
    return [
        Workload(TEXT, text, False, TOKENS, count(16), max(1, round(30 * scale))),
        streamed(STREAM, 32, 2),
        streamed(FOUR, 16, 1, quarters),
        streamed(ONE, 16, 1, whole),
    ]


def held_requests(clients: int) -> Workload:
    """What is sent at once for the figure of memory."""
    body = answers.request("held", 1, stream=True, size=900, images=[answers.image(4 << 20, 9)])
    return Workload("held", body, True, 1, clients, 1)


@dataclass(slots=True)
class Figures:
    """What was measured of one candidate."""

    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # workload → seconds per request
    first: list[float] = field(default_factory=list)  # seconds to the first byte of each stream
    peak: float | None = None  # MB

    def cpu_us(self, workload: str) -> float:
        return median(self.cpu[workload]) * 1e6

    def tokens(self) -> list[float]:
        """CPU seconds per token, of each repeat."""
        pairs = zip(self.cpu[STREAM], self.cpu[TEXT], strict=True)
        return [(stream - text) / TOKENS for stream, text in pairs]

    def by(self, other: Figures | None, workload: str) -> float | None:
        """CPU by another's: the median of what each repeat gave, since the machine's load drifts between them."""
        if other is None or workload not in other.cpu:
            return None
        return median(mine / theirs for mine, theirs in zip(self.cpu[workload], other.cpu[workload], strict=True))

    def first_ms(self) -> dict[str, float]:
        return {"median": median(self.first) * 1e3, "p99": quantiles(self.first, n=100, method="inclusive")[-1] * 1e3}


Results = dict[str, Figures]


async def measure(candidate: Candidate, workload: Workload, figures: Figures) -> None:
    """One run of `workload` through `candidate`. Raises NotServed."""
    async with connected(candidate.url, workload.clients) as clients:
        pids = candidate.pids
        before = usage.cpu_seconds(pids)
        got = await drive(clients, workload)
        figures.cpu[workload.name].append((usage.cpu_seconds(pids) - before) / len(got))
    if workload.name == STREAM:
        figures.first += [answer.first_byte for answer in got]


async def measure_direct(url: str, workload: Workload, figures: Figures) -> None:
    async with connected(url, workload.clients) as clients:
        figures.first += [answer.first_byte for answer in await drive(clients, workload)]


async def measure_memory(candidate: Candidate, slow: Sequence[str], workload: Workload, figures: Figures) -> None:
    """All requests of `workload` held at once, by the engines at the URLs `slow`."""
    await set_pace(slow, HELD_S)
    try:
        async with connected(candidate.url, workload.clients) as clients:
            pids = candidate.pids
            usage.reset_peak(pids)
            await drive(clients, workload)
            figures.peak = usage.peak_bytes(pids) / MB
    finally:
        await set_pace(slow, 0.0)


async def set_pace(urls: Sequence[str], delay: float) -> None:
    for url in urls:
        client = Client(url)
        await client.post("/scripted", b'{"delay":%f,"interval":%f}' % (delay, INTERVAL_S), timeout=10)
        client.close()


@asynccontextmanager
async def engines() -> AsyncIterator[Fleet]:
    """One engine of each role, in processes of their own."""
    async with AsyncExitStack() as stack:
        urls = {}
        for role in ("encode", "prefill", "decode"):
            child = Child(role, "bench.scripted", ["--role", role, "--interval", str(INTERVAL_S)])
            stack.push_async_callback(child.stop)
            urls[role] = (await child.start(timeout=30),)
        yield Fleet(urls["encode"], urls["prefill"], urls["decode"])


async def run(report: Report, names: Sequence[str], options: Options, repeats: int, scale: float) -> Results:
    """Measure the candidates `names` in turns. The engines and this process stay on one core, proxies on the other."""
    theirs, ours = usage.cores()
    if theirs == ours:
        report.progress("one core only: the proxy shares it with engines and load")
    results: Results = {DIRECT: Figures(), **{name: Figures() for name in names}}
    with usage.pinned(ours):
        async with AsyncExitStack() as stack:
            fleet = await stack.enter_async_context(engines())
            started = []
            for name in names:
                with usage.pinned(theirs):
                    started.append(await stack.enter_async_context(running(name, fleet, options)))
            await turns(report, started, fleet, results, repeats, scale)
    return results


async def turns(
    report: Report, started: list[Candidate], fleet: Fleet, results: Results, repeats: int, scale: float
) -> None:
    loads = workloads(scale)
    for number in range(repeats):
        report.progress(f"repeat {number + 1} of {repeats}")
        for workload in loads:
            if workload.name == STREAM:
                await measure_direct(fleet.decode[0], workload, results[DIRECT])
            for candidate in started[number % len(started) :] + started[: number % len(started)]:
                if candidate.name == BARE and workload.name not in (TEXT, STREAM):
                    continue
                await measure(candidate, workload, results[candidate.name])
    held = held_requests(max(1, round(HELD_REQUESTS * scale)))
    for candidate in started:
        if candidate.name == BARE:
            continue
        report.progress(f"memory of {candidate.name}")
        slow = fleet.decode if candidate.name == "nginx" else (*fleet.encode, *fleet.prefill)
        await measure_memory(candidate, slow, held, results[candidate.name])


# ---- what is told of it


def tell(report: Report, results: Results) -> None:
    """Rows and bars; a bar against a peer that was not measured is left out."""
    direct = results[DIRECT].first_ms()
    nginx, router, bare = results.get("nginx"), results.get("vllm-router"), results.get(BARE)
    for name, figures in results.items():
        if name == DIRECT:
            continue
        added = {key: value - direct[key] for key, value in figures.first_ms().items()}
        for workload in figures.cpu:
            streams = workload == STREAM
            report.row(
                candidate=name,
                workload=workload,
                cpu_us_per_request=figures.cpu_us(workload),
                by_nginx=figures.by(nginx, workload),
                by_vllm_router=figures.by(router, workload),
                by_bare=figures.by(bare, workload),
                cpu_us_per_token=median(figures.tokens()) * 1e6 if streams else None,
                added_ttft_ms_median=added["median"] if streams else None,
                added_ttft_ms_p99=added["p99"] if streams else None,
                peak_rss_mb=figures.peak if workload == ONE else None,
            )
    for handoff in HANDOFFS:
        bars(report, handoff, results)


def bars(report: Report, handoff: str, results: Results) -> None:
    figures, direct = results[f"triptych-{handoff}"], results[DIRECT].first_ms()
    nginx, router = results.get("nginx"), results.get("vllm-router")
    for workload, limit in ((TEXT, 1.0), (FOUR, IMAGES_BY_ROUTER)):
        if (ratio := figures.by(router, workload)) is not None:
            report.bar(f"{handoff}: {workload}, CPU by vllm-router's", ratio, limit)
    if nginx is not None:
        ratio = median(mine / theirs for mine, theirs in zip(figures.tokens(), nginx.tokens(), strict=True))
        report.bar(f"{handoff}: token, CPU by nginx's", ratio, TOKEN_BY_NGINX)
        report.bar(f"{handoff}: {FOUR}, CPU ms", figures.cpu_us(FOUR) / 1e3, images_limit(nginx.cpu_us(FOUR) / 1e3))
    for key, limit in ADDED_MS.items():
        added = figures.first_ms()[key] - direct[key]
        report.bar(f"{handoff}: added time to first token, ms, {key}", added, limit)
    if figures.peak is not None:
        report.bar(f"{handoff}: MB resident at {HELD_REQUESTS} requests of 4 MB", figures.peak, HELD_MB)


def images_limit(nginx_ms: float) -> float:
    """The limit in ms of the four images, on a machine on which they cost nginx `nginx_ms`."""
    least, most = NGINX_MS
    return round(IMAGES_MS * (nginx_ms / least if nginx_ms < least else nginx_ms / most if nginx_ms > most else 1.0), 2)


def chosen(report: Report, asked: Sequence[str], options: Options) -> list[str]:
    """The peers among `asked` that are installed."""
    present = [name for name in known(asked) if found(name, options)]
    for name in asked:
        if name not in present:
            report.progress(f"{name} is not installed: left out, with its bars (--peers-bin DIR tells where it is)")
    return present


def add_peers(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """`--peers` and `--peers-bin`, the same for every benchmark of proxies."""
    parser.add_argument("--peers", default=",".join(default), help=f"of {', '.join(PEERS)}; empty: none")
    parser.add_argument("--peers-bin", type=Path, metavar="DIR", help="where the peers' programs are besides PATH")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add_peers(parser, tuple(PEERS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each workload; medians are told")
    parser.add_argument("--scale", type=float, default=1.0, help="under 1: fewer requests, for a quick look")
    arguments = parser.parse_args(argv)
    report = Report("overhead")
    options = Options(arguments.peers_bin)
    try:
        peers = chosen(report, [name for name in arguments.peers.split(",") if name], options)
        names = [*(f"triptych-{handoff}" for handoff in HANDOFFS), *peers, BARE]
        results = uvloop.run(run(report, names, options, max(1, arguments.repeats), arguments.scale))
    except (NotStarted, NotServed, ValueError) as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 2
    tell(report, results)
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
