"""What being looked at costs: metrics, traces, GET /metrics of a large fleet, the page with its viewers.

One proxy for each setting stands before the same scripted engines, on a core of its own; they work in turns within one
run, and what is compared are ratios.

- A text request (prefill and decode apart): CPU of the proxy with metrics and traces off and on. Traces go to a
  collector that takes them; one in ten, as by default, and all.
- GET /metrics and the page, of a proxy that knows 200 engines, most of which do not run: CPU of a scrape, and of a
  second of 20 viewers, each told how many text requests cost as much.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median

import aiohttp
import uvloop

from bench.overhead import TEXT, engines, workloads
from bench.report import Report, add_arguments
from bench.scripted import usage
from bench.scripted.candidates import Candidate, Fleet, NotStarted, Options, running
from bench.scripted.load import NotServed, Workload, connected, drive
from bench.scripted.server import Connection, Request

OFF, ON, SOME, ALL = "metrics off", "metrics on", "metrics on, one in ten traced", "metrics on, all traced"
SCRAPE, PAGE = "GET /metrics at 200 engines", "the page at 200 engines, a second of 20 viewers"
INSTANCES = 200
VIEWERS = 20
SCRAPES = 30
SLICES = 8  # of a repeat, in which the settings take turns: a machine's pace drifts within seconds
WATCHED_S = 4.0
ON_BY_OFF = 1.05

Costs = dict[str, list[float]]
"""CPU seconds by what cost them, one for each repeat."""


def flags(setting: str, collector: str) -> tuple[str, ...]:
    if setting == OFF:
        return ("--metrics", "off")
    share = {SOME: "0.1", ALL: "1"}.get(setting)
    return () if share is None else ("--otlp-endpoint", collector, "--trace-sample", share)


def large(fleet: Fleet) -> Fleet:
    """With so many more prefill and decode engines that it has 200; nobody listens where they are."""
    more = [f"http://127.1.{number // 250}.{1 + number % 250}:9" for number in range(INSTANCES - 3)]
    half = len(more) // 2
    return Fleet(fleet.encode, (*fleet.prefill, *more[:half]), (*fleet.decode, *more[half:]))


@asynccontextmanager
async def collecting() -> AsyncIterator[str]:
    """The URL of a collector that takes whatever it is sent."""

    def handle(request: Request, connection: Connection) -> None:
        connection.respond(200, b"", "application/x-protobuf")

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(handle, lambda connection: None), "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def spent(candidate: Candidate, work: Callable[[], Awaitable[object]]) -> float:
    """CPU seconds of the proxy while `work` runs."""
    pids = candidate.pids
    before = usage.cpu_seconds(pids)
    await work()
    return usage.cpu_seconds(pids) - before


async def request(candidate: Candidate, workload: Workload) -> float:
    """CPU seconds of one. Raises NotServed."""
    async with connected(candidate.url, workload.clients) as clients:
        return await spent(candidate, lambda: drive(clients, workload)) / workload.requests


async def in_turns(settings: Sequence[tuple[str, Candidate]], workload: Workload, costs: Costs) -> None:
    """One more of each setting's costs, of `SLICES` runs each. Raises NotServed."""
    found: dict[str, float] = dict.fromkeys((name for name, _ in settings), 0.0)
    for number in range(SLICES):
        turn = number % len(settings)
        for name, candidate in [*settings[turn:], *settings[:turn]]:
            found[name] += await request(candidate, workload) / SLICES
    for name, seconds in found.items():
        costs[name].append(seconds)


async def get(http: aiohttp.ClientSession, url: str) -> bytes:
    async with http.get(url) as answer:
        answer.raise_for_status()
        return await answer.read()


async def scrape(candidate: Candidate, http: aiohttp.ClientSession) -> float:
    """CPU seconds of one."""

    async def work() -> None:
        for _ in range(SCRAPES):
            await get(http, f"{candidate.url}/metrics")

    return await spent(candidate, work) / SCRAPES


async def watched(candidate: Candidate, http: aiohttp.ClientSession, seconds: float) -> float:
    """CPU seconds that a second of viewers adds to one of none."""

    async def viewer(number: int) -> None:
        await asyncio.sleep(number / VIEWERS)
        await get(http, f"{candidate.url}/ui/state")
        for _ in range(max(1, round(seconds)) - 1):
            await asyncio.sleep(1)
            await get(http, f"{candidate.url}/ui/state?since=0")

    idle = await spent(candidate, lambda: asyncio.sleep(seconds))
    busy = await spent(candidate, lambda: asyncio.gather(*map(viewer, range(VIEWERS))))
    return (busy - idle) / max(1, round(seconds))


async def run(report: Report, repeats: int, scale: float) -> Costs:
    """The engines, the collector and this process stay on one core, the proxies on the other."""
    theirs, ours = usage.cores()
    costs: Costs = defaultdict(list)
    text = next(workload for workload in workloads(scale / 4) if workload.name == TEXT)
    with usage.pinned(ours):
        async with AsyncExitStack() as stack:
            fleet = await stack.enter_async_context(engines())
            collector = await stack.enter_async_context(collecting())
            http = await stack.enter_async_context(aiohttp.ClientSession())

            async def started(known: Fleet, *arguments: str) -> Candidate:
                with usage.pinned(theirs):
                    options = Options(arguments=("--log-level", "warning", *arguments))
                    return await stack.enter_async_context(running("triptych-pull", known, options))

            settings = [(name, await started(fleet, *flags(name, collector))) for name in (OFF, ON, SOME, ALL)]
            crowded = await started(large(fleet), "--probe-interval", "3600")
            await request(crowded, text)  # so that there is something to tell
            for number in range(repeats):
                report.progress(f"repeat {number + 1} of {repeats}")
                await in_turns(settings, text, costs)
                costs[SCRAPE].append(await scrape(crowded, http))
                costs[PAGE].append(await watched(crowded, http, WATCHED_S * scale))
    return costs


def by(costs: Costs, what: str, other: str) -> float:
    """The median of what each repeat gave, since the machine's load drifts between them."""
    return median(mine / theirs for mine, theirs in zip(costs[what], costs[other], strict=True))


def tell(report: Report, costs: Costs) -> None:
    for what, found in costs.items():
        looking = what in (SCRAPE, PAGE)
        report.row(
            what=what,
            cpu_us=round(median(found) * 1e6, 1),
            by_metrics_off=None if looking else by(costs, what, OFF),
            as_text_requests=by(costs, what, ON) if looking else None,
        )
    report.bar("a text request with metrics on and traces off, CPU by metrics off", by(costs, ON, OFF), ON_BY_OFF)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scrape", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each; medians are told")
    parser.add_argument("--scale", type=float, default=1.0, help="under 1: fewer requests, for a quick look")
    arguments = parser.parse_args(argv)
    report = Report("scrape")
    try:
        costs = uvloop.run(run(report, max(1, arguments.repeats), arguments.scale))
    except (NotStarted, NotServed) as error:
        print(f"scrape: {error}", file=sys.stderr)
        return 2
    tell(report, costs)
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
