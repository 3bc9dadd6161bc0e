"""A soak: full load while engines are killed and started again at random. Counts lies and leaks, and who was served.

Two scripted engines of each role run as processes; every second or so one is killed with -9 and comes back on its port.
Clients send text and images, streamed and not, and some of them hang up. After a warm-up the proxy's descriptors and
memory are taken while it is idle; at the end, idle again, nothing more may be open, no lease may be held, and no more
memory be used. The engines' own leases are in `GET /instances` of the proxy.

With --discovery the engines are on no list: names and heartbeats tell of them, and besides being killed they are taken
away and brought back, while the name server fails now and then. In a last part nobody is killed: then not one request
may fail.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import uvloop

from bench.report import Report, add_arguments
from bench.scripted import answers, usage
from bench.scripted.candidates import HANDOFFS, Candidate, Fleet, NotStarted, Options, command_of, free_port, launched
from bench.scripted.client import Client
from bench.scripted.directory import Directory, directory
from bench.scripted.verdict import Verdict, judge
from deploy.processes import Child

ROLES = ("encode", "prefill", "decode")
INSTANCES = 2
CLIENTS = 24
TOKENS = 20
INTERVAL_S = 0.01
IMAGES = (0, 0, 1, 3)  # per request, one of these
IMAGE_BYTES = (20_000, 300_000)
LEAVES = 0.1  # share of requests whose client hangs up
KILL_EVERY_S = (0.5, 2.5)
DOWN_S = (0.1, 1.5)
AWAY_S = (0.2, 2.0)  # without a listing
NAMELESS = 0.2  # share of changes during which the name server fails
RETURN_S = 10.0  # for one that is listed again to be READY
PATIENCE_S = 30.0
WARM_UP = (0.2, 60.0)  # share of the time, and at most so many seconds
# Until an idle proxy has closed all that it may: at least, at most. A decode engine's idle connections to the
# metaserver are a client's, kept for 75 s: their number says how many calls came at once, and nothing of a leak.
SETTLE_S = 80, 100
MB = 1 << 20

# Bars: what may be open or used at the end beyond the idle state after the warm-up.
EXTRA_DESCRIPTORS = 0
EXTRA_MEMORY = 0.1, 32.0  # a tenth, or so many MB: an allocator gives back when it likes to


@dataclass(frozen=True, slots=True)
class State:
    """Of an idle proxy."""

    leases: int
    fds: int
    sockets: int
    rss_mb: float


@dataclass(slots=True)
class Tally:
    """What clients saw."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)
    kills: int = 0
    changes: int = 0  # engines taken away and brought back

    @property
    def failed(self) -> int:
        """Requests that a client stayed for and was not served."""
        return sum(number for verdict, number in self.verdicts.items() if verdict not in (Verdict.SERVED, Verdict.LEFT))


class Engines:
    """The processes, and the hand that kills them."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._children: dict[str, list[Child]] = {role: [] for role in ROLES}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            for role, number in itertools.product(ROLES, range(INSTANCES)):
                flags = ["--role", role, "--interval", str(INTERVAL_S), "--port", "0"]
                child = Child(f"{role}-{number}", "bench.scripted", flags)
                stack.push_async_callback(child.stop)
                await child.start(timeout=30)
                child.keep_port()
                self._children[role].append(child)
            urls = {role: tuple(child.url for child in children) for role, children in self._children.items()}
            yield Fleet(urls["encode"], urls["prefill"], urls["decode"])

    async def kill_some(self, tally: Tally, until: float) -> None:
        """Kill one and start it again, and so on until the loop time `until`; then all are up."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(self._dice.uniform(*KILL_EVERY_S))
            child = self._dice.choice(self._children[self._dice.choice(ROLES)])
            child.signal(signal.SIGKILL)
            await child.wait()
            tally.kills += 1
            await asyncio.sleep(self._dice.uniform(*DOWN_S))
            await child.start(timeout=30)


class Load:
    """Clients that ask for everything, check every byte of it, and sometimes leave."""

    def __init__(self, url: str, dice: random.Random, tally: Tally) -> None:
        self._url = url
        self.dice = dice
        self._tally = tally
        self._numbers = itertools.count()
        self._images = [answers.image(size, seed) for size in IMAGE_BYTES for seed in range(8)]

    async def run(self, clients: int, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(until))

    async def _client(self, until: float) -> None:
        client = Client(self._url)
        while asyncio.get_running_loop().time() < until:
            verdict = await self._ask(client)
            if verdict in (Verdict.ERROR, Verdict.ABORT):
                await asyncio.sleep(self.dice.uniform(0, 0.1))  # as a client backs off; else refusals fill the count
        client.close()

    async def _ask(self, client: Client) -> Verdict:
        dice = self.dice
        tag, stream = f"q{next(self._numbers)}", dice.random() < 0.7
        images = dice.sample(self._images, dice.choice(IMAGES))
        body = answers.request(tag, TOKENS, stream=stream, images=images)
        leave = dice.uniform(0, TOKENS * INTERVAL_S) if dice.random() < LEAVES else None
        answer = await client.post(answers.CHAT, body, timeout=PATIENCE_S, leave_after=leave)
        verdict = judge(answer, answers.text(tag, TOKENS), stream=stream)
        self._tally.verdicts[verdict] += 1
        self._tally.statuses[answer.status] += 1
        if verdict is Verdict.LIE:
            self._tally.lies.append(f"{tag}: {answer.status} {answer.body[-300:]!r}")
        return verdict


async def run(
    report: Report, seconds: float, handoff: str, seed: int, discovery: bool = False
) -> tuple[Tally, State, State, Tally | None]:
    """Warm up, look, soak, look again; with `discovery` soak once more, without kills."""
    dice, tally = random.Random(seed), Tally()
    engines, quiet = Engines(dice), Tally() if discovery else None
    async with engines.running() as fleet, proxied(fleet, handoff, discovery) as (proxy, listed):
        share, most = WARM_UP
        warm = min(seconds * share, most)
        last = warm if discovery else 0.0
        await soak(report, engines, Load(proxy.url, dice, Tally()), Tally(), warm, listed)
        before = await idle(proxy)
        report.progress(f"idle after {warm:.0f} s of warm-up: {before}")
        await soak(report, engines, Load(proxy.url, dice, tally), tally, seconds - warm - last, listed)
        if quiet is not None and listed is not None:
            await listed.settled(RETURN_S)
            await soak(report, None, Load(proxy.url, dice, quiet), quiet, last, listed)
        after = await idle(proxy, before)
        report.progress(f"idle at the end: {after}")
    return tally, before, after, quiet


@asynccontextmanager
async def proxied(fleet: Fleet, handoff: str, discovery: bool) -> AsyncIterator[tuple[Candidate, Directory | None]]:
    """Our proxy in front of `fleet`, serving; with `discovery`, what tells it of that. Raises NotStarted."""
    name, port, flags = f"triptych-{handoff}", free_port(), ["--log-level", "error"]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        listed = None
        if discovery:
            urls = {"encode": fleet.encode, "prefill": fleet.prefill, "decode": fleet.decode}
            listed = await stack.enter_async_context(directory(f"http://127.0.0.1:{port}", urls))
            fleet, flags = Fleet((), (), ()), [*flags, *listed.flags()]
        command = command_of(name, fleet, Options(arguments=tuple(flags)), port, folder)
        yield await stack.enter_async_context(launched(name, command, port, folder)), listed


async def change_some(listed: Directory, dice: random.Random, tally: Tally, until: float) -> None:
    """Take one away and bring it back, and so on until the loop time `until`; then all are listed."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        url = dice.choice(listed.urls[dice.choice(ROLES)])
        listed.fail(dice.random() < NAMELESS)
        listed.drop(url)
        await asyncio.sleep(dice.uniform(*AWAY_S))
        listed.fail(False)
        listed.add(url)
        tally.changes += 1
        await listed.settled(RETURN_S)


async def soak(
    report: Report, engines: Engines | None, load: Load, tally: Tally, seconds: float, listed: Directory | None = None
) -> None:
    """With nobody killed where there are no `engines`, and nobody taken off a list where there is none."""
    until = asyncio.get_running_loop().time() + seconds
    async with asyncio.TaskGroup() as group:
        if engines is not None:
            group.create_task(engines.kill_some(tally, until))
        if listed is not None:
            group.create_task(change_some(listed, load.dice, tally, until))
        group.create_task(load.run(CLIENTS, until))
        group.create_task(tell_progress(report, tally, seconds))


async def tell_progress(report: Report, tally: Tally, seconds: float) -> None:
    """A line now and then."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        await asyncio.sleep(min(15.0, seconds - passed + 0.01))
        seen = ", ".join(f"{verdict} {number}" for verdict, number in sorted(tally.verdicts.items()))
        if seen:
            report.progress(f"{time.monotonic() - began:.0f} s, {tally.kills} kills, {tally.changes} changes: {seen}")


async def idle(proxy: Candidate, before: State | None = None) -> State:
    """The proxy's state once nothing moves in it any more; at the latest when `SETTLE_S` is over."""
    least, most = SETTLE_S
    await asyncio.sleep(least - 1)
    state = await look(proxy)
    for _ in range(least, most):
        await asyncio.sleep(1)
        last, state = state, await look(proxy)
        still = state.leases == 0 and state.fds == last.fds
        if still and (before is None or state.fds <= before.fds + EXTRA_DESCRIPTORS):
            break
    return state


async def look(proxy: Candidate) -> State:
    async with aiohttp.ClientSession() as http, http.get(f"{proxy.url}/instances") as response:
        instances = (await response.json())["instances"]
    pids = proxy.pids
    opened = usage.descriptors(pids)
    leases = sum(instance["leases"] for instance in instances)
    return State(leases, opened["fds"], opened["sockets"], round(usage.resident_bytes(pids) / MB, 1))


def tell(report: Report, handoff: str, tally: Tally, before: State, after: State, quiet: Tally | None = None) -> None:
    """`quiet`: of the part in which nobody was killed."""
    answered = sum(number for verdict, number in tally.verdicts.items() if verdict is not Verdict.LEFT)
    served = tally.verdicts[Verdict.SERVED]
    for lie in tally.lies[:5]:
        report.progress(f"a lie: {lie}")
    report.progress(f"statuses: {dict(sorted(tally.statuses.items()))}")
    report.row(
        handoff=handoff,
        requests=sum(tally.verdicts.values()),
        kills=tally.kills,
        changes=tally.changes,
        **{str(verdict): tally.verdicts[verdict] for verdict in Verdict},
        served_share=served / max(1, answered),
        leases_at_end=after.leases,
        fds=after.fds - before.fds,
        sockets=after.sockets - before.sockets,
        rss_mb_before=before.rss_mb,
        rss_mb_after=after.rss_mb,
    )
    share, mb = EXTRA_MEMORY
    report.bar(f"{handoff}: lies", tally.verdicts[Verdict.LIE], 0)
    report.bar(f"{handoff}: hung", tally.verdicts[Verdict.HUNG], 0)
    report.bar(f"{handoff}: leases held at the end", after.leases, 0)
    report.bar(f"{handoff}: descriptors more than after the warm-up", after.fds - before.fds, EXTRA_DESCRIPTORS)
    report.bar(f"{handoff}: sockets more than after the warm-up", after.sockets - before.sockets, EXTRA_DESCRIPTORS)
    most = round(before.rss_mb + max(before.rss_mb * share, mb))
    report.bar(f"{handoff}: MB resident at the end", after.rss_mb, most)
    report.bar(f"{handoff}: requests served", served, 1, ">=")
    if quiet is not None:
        statuses = dict(sorted(quiet.statuses.items()))
        report.progress(f"{quiet.changes} changes without kills, {sum(quiet.verdicts.values())} requests: {statuses}")
        report.bar(f"{handoff}: requests failed by changes alone", quiet.failed, 0)
        report.bar(f"{handoff}: changes alone", quiet.changes, 1, ">=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=2.0, help="of load, the warm-up included")
    parser.add_argument("--handoff", choices=HANDOFFS, default="push", help="the proxy's --kv-handoff")
    parser.add_argument("--discovery", action="store_true", help="engines are found, taken away and brought back")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    arguments = parser.parse_args(argv)
    report = Report("chaos")
    try:
        found = uvloop.run(run(report, arguments.minutes * 60, arguments.handoff, arguments.seed, arguments.discovery))
    except NotStarted as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    tell(report, arguments.handoff, *found)
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
