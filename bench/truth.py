"""What clients are told when engines fail: every answer judged as served, honest error, visible abort, lie or hung.

Behind each proxy stand two scripted instances per role. One of them is faulty in one way at a time; probes find it
healthy. Several requests at once, streamed and not, meet a proxy that has seen nothing yet. Then clients leave in the
middle of each phase, and engines count the callers that left them.

What must hold of Triptych: what a healthy instance could serve is served, an engine's 400 is passed on, nothing is
aborted, nothing is a lie, nothing hangs beyond the stages' timeouts, and engines see every client leave. A stream that
broke after its first bytes may end with an error event.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import uvloop

from bench.overhead import add_peers, chosen
from bench.report import Report, add_arguments
from bench.scripted import answers
from bench.scripted.candidates import HANDOFFS, Fleet, NotStarted, Options, running
from bench.scripted.client import Answer, Client
from bench.scripted.engine import Engine, Pace, Rooms
from bench.scripted.faults import BEFORE_CONTENT, Fault
from bench.scripted.verdict import Verdict, judge

Role = Literal["encode", "prefill", "decode"]

TOKENS = 12
INSTANCES = 2
REQUESTS = 4  # at once, so that a balanced proxy sends half of them to the faulty instance
IMAGE_BYTES = 4000
STAGE_TIMEOUT_S = 1.5
PATIENCE_S = 4 * STAGE_TIMEOUT_S + 2  # of a client: a hang in each of three stages, and one more try
LEAVE_AFTER_S = 0.3
SEEN_WITHIN_S = 1.0  # the time that an engine has to see its caller leave; how long it took is told beside
SLOW = Pace(delay=10.0)
STREAMING = Pace(interval=0.2)
PACE = Pace(interval=0.005)
AT_ONCE = 4  # cases that run beside each other, each with engines and a proxy of its own

TIMEOUTS = tuple(
    itertools.chain.from_iterable(
        (f"--{name}-timeout", str(STAGE_TIMEOUT_S))
        for name in ("connect", "encode", "prefill", "first-token", "stream-idle", "answer")
    )
)


@dataclass(frozen=True, slots=True)
class Case:
    """One fault of one instance of one role."""

    proxy: str
    role: Role
    fault: Fault


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request of a case ended. `met`: how many calls of its lot met the fault."""

    case: Case
    stream: bool
    verdict: Verdict
    status: int
    right: bool
    met: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Clients that left in one phase: how many the engines of that phase held and saw leave, and the slowest."""

    proxy: str
    phase: str
    left: int
    seen: int
    worst_s: float


class Engines:
    """Two of each role, in this process."""

    def __init__(self, roles: Sequence[Role], pace: Pace) -> None:
        rooms = Rooms()
        self.by_role: dict[str, list[Engine]] = {
            role: [Engine(role, pace, rooms=rooms) for _ in range(INSTANCES)] for role in roles
        }

    @property
    def fleet(self) -> Fleet:
        urls = {role: tuple(engine.url for engine in engines) for role, engines in self.by_role.items()}
        return Fleet(urls.get("encode", ()), urls["prefill"], urls["decode"])


@asynccontextmanager
async def deployed(proxy: str, options: Options) -> AsyncIterator[tuple[Engines, str]]:
    """Engines and `proxy` before them: the engines and the URL."""
    async with AsyncExitStack() as stack:
        engines = Engines(roles_of(proxy), Pace(PACE.delay, PACE.interval))
        for engine in itertools.chain.from_iterable(engines.by_role.values()):
            await stack.enter_async_context(engine)
        candidate = await stack.enter_async_context(running(proxy, engines.fleet, options))
        yield engines, candidate.url


def roles_of(proxy: str) -> tuple[Role, ...]:
    return ("encode", "prefill", "decode") if ours(proxy) else ("prefill", "decode")


def ours(proxy: str) -> bool:
    return proxy.startswith("triptych-")


def cases(proxy: str, faults: Sequence[Fault]) -> Iterator[Case]:
    for role in roles_of(proxy):
        for fault in faults:
            yield Case(proxy, role, fault)


# ---- failures


async def play(case: Case, options: Options) -> list[Outcome]:
    """Every request of `case`, streamed and then not, each lot against a proxy of its own."""
    outcomes = []
    for stream in (True, False):
        async with deployed(case.proxy, options) as (engines, url):
            faulty = engines.by_role[case.role][0]
            faulty.fault = case.fault
            with_image = case.role == "encode"
            got = await asyncio.gather(*(ask(url, n, stream, with_image) for n in range(REQUESTS)))
            met = faulty.counters.failed
            for verdict, answer in got:
                right = is_right(case, stream, verdict, answer.status)
                outcomes.append(Outcome(case, stream, verdict, answer.status, right, met))
    return outcomes


async def ask(url: str, number: int, stream: bool, with_image: bool) -> tuple[Verdict, Answer]:
    tag = f"r{number}"
    images = [answers.image(IMAGE_BYTES, number)] if with_image else []
    client = Client(url)
    body = answers.request(tag, TOKENS, stream=stream, images=images)
    answer = await client.post(answers.CHAT, body, timeout=PATIENCE_S)
    client.close()
    return judge(answer, answers.text(tag, TOKENS), stream=stream), answer


def is_right(case: Case, stream: bool, verdict: Verdict, status: int) -> bool:
    """Whether this is the best that could be told. Another instance can serve all but two things: a request that the
    engine calls the client's mistake, and a stream that has begun."""
    if verdict is Verdict.SERVED:
        return True
    if case.fault is Fault.CLIENT_ERROR:
        return verdict is Verdict.ERROR and status == 400
    begun = stream and case.role == "decode" and case.fault not in BEFORE_CONTENT
    return begun and verdict is Verdict.ERROR


# ---- cancellations


async def leave(proxy: str, phase: Role, stream: bool, options: Options) -> Cancelled:
    """Clients leave while engines of `phase` work for them."""
    async with deployed(proxy, options) as (engines, url):
        held = engines.by_role[phase]
        for engine in held:
            engine.pace = STREAMING if stream and phase == "decode" else SLOW
        loop = asyncio.get_running_loop()
        clients = [Client(url) for _ in range(REQUESTS)]
        images = [answers.image(IMAGE_BYTES, 1)] if phase == "encode" else []
        waits = []
        for number, client in enumerate(clients):
            body = answers.request(f"r{number}", TOKENS, stream=stream, images=images)
            waits.append(client.post(answers.CHAT, body, timeout=PATIENCE_S, leave_after=LEAVE_AFTER_S))
        sent = asyncio.gather(*waits)
        at_work = await until(lambda: count(held, "running") >= REQUESTS, LEAVE_AFTER_S / 2)
        running_now = REQUESTS if at_work else count(held, "running")
        await sent
        left_at = loop.time()
        await until(lambda: count(held, "left") >= running_now, SEEN_WITHIN_S)
        seen = [at - left_at for engine in held for at in engine.left_at]
        name = f"{phase}, {'streamed' if stream else 'whole'}"
        return Cancelled(proxy, name, running_now, min(len(seen), running_now), max(0.0, *seen, 0.0))


def count(engines: Sequence[Engine], name: str) -> int:
    return sum(getattr(engine.counters, name) for engine in engines)


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


# ---- all of it


async def run(
    report: Report, proxies: Sequence[str], faults: Sequence[Fault], options: dict[str, Options]
) -> tuple[list[Outcome], list[Cancelled]]:
    """Every case and every cancellation, some beside each other."""
    outcomes: list[Outcome] = []
    cancelled: list[Cancelled] = []
    places = asyncio.Semaphore(AT_ONCE)

    async def one(case: Case) -> None:
        async with places:
            outcomes.extend(await play(case, options[case.proxy]))

    async def another(proxy: str, phase: Role, stream: bool) -> None:
        async with places:
            cancelled.append(await leave(proxy, phase, stream, options[proxy]))

    for proxy in proxies:
        report.progress(proxy)
        async with asyncio.TaskGroup() as group:
            for case in cases(proxy, faults):
                group.create_task(one(case))
        async with asyncio.TaskGroup() as group:
            for phase, stream in itertools.product(roles_of(proxy), (True, False)):
                group.create_task(another(proxy, phase, stream))
    return outcomes, cancelled


def tell(report: Report, outcomes: Sequence[Outcome], cancelled: Sequence[Cancelled]) -> None:
    proxies = list(dict.fromkeys(outcome.case.proxy for outcome in outcomes))
    for proxy in proxies:
        for fault in Fault:
            row(report, proxy, str(fault), [o for o in outcomes if o.case.proxy == proxy and o.case.fault is fault])
    for proxy in proxies:
        mine = [outcome for outcome in outcomes if outcome.case.proxy == proxy]
        row(report, proxy, "all", mine)
        bars(report, proxy, mine, [c for c in cancelled if c.proxy == proxy])


def row(report: Report, proxy: str, fault: str, outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    kinds = (Verdict.SERVED, Verdict.ERROR, Verdict.ABORT, Verdict.LIE, Verdict.HUNG)
    wrong = sorted(
        {f"{o.case.role}/{'stream' if o.stream else 'whole'}: {o.verdict} {o.status}" for o in outcomes if not o.right}
    )
    report.row(
        proxy=proxy,
        fault=fault,
        requests=len(outcomes),
        **{str(kind): verdicts[kind] for kind in kinds},
        right=sum(outcome.right for outcome in outcomes),
        wrong="; ".join(wrong) if fault != "all" else "",
    )


def bars(report: Report, proxy: str, outcomes: Sequence[Outcome], cancelled: Sequence[Cancelled]) -> None:
    """Bars for our own proxy; of peers the same figures are told as progress."""
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    left, seen = sum(c.left for c in cancelled), sum(c.seen for c in cancelled)
    worst = max((c.worst_s for c in cancelled), default=0.0)
    unseen = ", ".join(f"{c.phase} ({c.seen} of {c.left})" for c in cancelled if c.seen < c.left) or "none"
    report.progress(f"{proxy}: clients left {left}, seen by engines {seen}, slowest {worst:.3f} s, not seen: {unseen}")
    missed = {(o.case.role, str(o.case.fault)) for o in outcomes if not o.met}
    for role, fault in sorted(missed):
        report.progress(f"{proxy}: no request met the fault {fault} at {role} in one of the two runs")
    if not ours(proxy):
        return
    refused = [o for o in outcomes if o.case.fault is Fault.CLIENT_ERROR]
    told = sum(o.verdict is Verdict.ERROR and o.status == 400 for o in refused)
    met = sum({(o.case, o.stream): o.met for o in refused}.values())  # more than told: a client's mistake was retried
    right = sum(outcome.right for outcome in outcomes)
    report.bar(f"{proxy}: share answered as well as could be", right / len(outcomes), 1.0, ">=")
    if met:
        report.bar(f"{proxy}: share of engines' 400 passed on", told / met, 1.0, ">=")
    for kind in (Verdict.ABORT, Verdict.LIE, Verdict.HUNG):
        report.bar(f"{proxy}: {kind}", verdicts[kind], 0)
    if left:
        report.bar(f"{proxy}: share of clients' leaving seen by engines", seen / left, 1.0, ">=")


def options_for(proxy: str, arguments: argparse.Namespace) -> Options:
    if ours(proxy):
        return Options(None, STAGE_TIMEOUT_S, TIMEOUTS)
    return Options(arguments.peers_bin, STAGE_TIMEOUT_S * 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.truth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add_peers(parser, ("vllm-router", "sglang-router"))
    parser.add_argument("--faults", default=",".join(Fault), help="some of these only")
    parser.add_argument("--handoffs", default=",".join(HANDOFFS), help="Triptych's KV handoffs to try")
    arguments = parser.parse_args(argv)
    report = Report("truth")
    try:
        peers = chosen(report, [name for name in arguments.peers.split(",") if name], Options(arguments.peers_bin))
        proxies = [*(f"triptych-{handoff}" for handoff in arguments.handoffs.split(",")), *peers]
        faults = [Fault(name) for name in arguments.faults.split(",")]
        options = {proxy: options_for(proxy, arguments) for proxy in proxies}
        outcomes, cancelled = uvloop.run(run(report, proxies, faults, options))
    except ValueError as error:
        parser.error(str(error))
    except ExceptionGroup as failed:
        started, others = failed.split(NotStarted)
        if others is not None or started is None:
            raise
        print(f"truth: {started.exceptions[0]}", file=sys.stderr)
        return 2
    tell(report, outcomes, cancelled)
    return report.emit(arguments)


if __name__ == "__main__":
    sys.exit(main())
