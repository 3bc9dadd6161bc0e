"""Waiting for a place: cancelled, timed out, pushed out, stopped; the place is never lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import inf

import orjson
import pytest

from proxy import openai
from proxy.core import Api, Job, Stage
from proxy.errors import BadRequest, Overloaded, ProxyError, QueueTimeout, ShuttingDown, TooLate
from proxy.intake.admission import Admission, Limits, Outlook
from proxy.intake.gate import Gate, Targets
from proxy.openai import Identity
from proxy.telemetry.metrics import Metrics
from tests.fakes.media import chat, image, part


def nothing_foreseen(job: Job) -> Outlook:
    raise AssertionError("without a target nobody asks")


def gate(
    queue: int = 2,
    patience: float = 10.0,
    requests: int = 1,
    foresee: Callable[[Job], Outlook] = nothing_foreseen,
    targets: Targets = Targets(),  # noqa: B008 - frozen
) -> Gate:
    return Gate(Admission(Limits(requests, 1 << 20, queue, patience)), Metrics(), time.monotonic, foresee, targets)


def job(priority: int = 0, media: bool = False, **headers: str) -> Job:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = chat(*([part(image())] if media else []), priority=priority)
    return openai.parse(orjson.dumps(body), Api.CHAT, "id", Identity(), named)


async def visit(gate: Gate, left: asyncio.Event, priority: int = 0) -> None:
    entry = await gate.enter(job(priority))
    try:
        await left.wait()
    finally:
        gate.leave(entry)


async def until_waiting(gate: Gate, number: int) -> None:
    async with asyncio.timeout(10):
        while gate.admission.waiting != number:
            await asyncio.sleep(0)


async def test_who_waits_gets_the_place_that_becomes_free() -> None:
    g, left = gate(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(visit(g, left))
        await until_waiting(g, 2)
        left.set()
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


async def test_who_leaves_the_queue_leaves_nothing_behind() -> None:
    g, left = gate(), asyncio.Event()
    inside = asyncio.create_task(visit(g, left))
    waiting = [asyncio.create_task(visit(g, left)) for _ in range(2)]
    await until_waiting(g, 2)
    waiting[0].cancel()
    await until_waiting(g, 1)
    left.set()
    await asyncio.gather(inside, waiting[1])
    assert waiting[0].cancelled() and g.admission.requests == 0


async def test_a_place_won_in_the_moment_of_leaving_is_given_on() -> None:
    g, left, forever = gate(), asyncio.Event(), asyncio.Event()
    inside = asyncio.create_task(visit(g, left))
    first, second = (asyncio.create_task(visit(g, forever)) for _ in range(2))
    await until_waiting(g, 2)
    left.set()
    await inside
    first.cancel()  # it is admitted already, and does not know it yet
    await asyncio.wait([first])
    forever.set()
    await second
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


@pytest.mark.parametrize("how", ["late", "pushed"])
async def test_who_waits_in_vain_is_told_why(how: str) -> None:
    g, left = gate(queue=1, patience=0.05 if how == "late" else 10.0), asyncio.Event()
    inside = asyncio.create_task(visit(g, left))
    waiting = asyncio.create_task(visit(g, left, priority=3))
    await until_waiting(g, 1)
    urgent = asyncio.create_task(visit(g, left, priority=0)) if how == "pushed" else None
    errors: dict[str, type[ProxyError]] = {"late": QueueTimeout, "pushed": Overloaded}
    with pytest.raises(errors[how]):
        await waiting
    left.set()
    await asyncio.gather(inside, *filter(None, [urgent]))
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


async def test_who_waits_when_the_proxy_stops_is_served_and_nobody_after() -> None:
    g, left = gate(), asyncio.Event()
    visits = [asyncio.create_task(visit(g, left)) for _ in range(2)]
    await until_waiting(g, 1)
    g.close()
    with pytest.raises(ShuttingDown):
        await visit(g, left)
    left.set()
    await asyncio.gather(*visits)
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


class Engines:
    """Idle ones take 10 ms to a first token; `busy` is the work before them, in seconds."""

    def __init__(self, busy: float = 0.0) -> None:
        self.busy = busy
        self.room = True
        self.served: list[int] = []  # priorities, as they began

    def foresee(self, job: Job) -> Outlook:
        return Outlook(0.01 + self.busy, 0.01, 0.001, 0.001, Stage.ENCODE, self.room or not job.items)

    async def serve(self, gate: Gate, asked: Job, work: float = 0.0, left: asyncio.Event | None = None) -> None:
        """As the dispatcher does: the work is charged in the moment in which it is let in."""
        entry = await gate.enter(asked)
        self.served.append(asked.body.get("priority", 0))
        self.busy += work
        try:
            if left is not None:
                await left.wait()
        finally:
            self.busy -= work
            gate.leave(entry)


async def test_parked_ones_go_on_one_by_one_as_load_drains_though_nobody_leaves() -> None:
    engines, left = Engines(busy=30.0), asyncio.Event()
    g = gate(9, requests=9, foresee=engines.foresee, targets=Targets(first=20.0))
    async with asyncio.TaskGroup() as group:
        for priority in (2, 1, 3):
            group.create_task(engines.serve(g, job(priority), 15.0, left))
        await until_waiting(g, 3)
        engines.busy = 1.0
        async with asyncio.timeout(10):
            while len(engines.served) < 1:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)  # several looks
        assert engines.served == [1, 2], "before the third there would be 31 seconds of work"
        left.set()
    assert engines.served == [1, 2, 3]
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


async def test_one_look_lets_in_all_who_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(busy=30.0)
    g = gate(9, requests=9, foresee=engines.foresee, targets=Targets(first=20.0))
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(engines.serve(g, job()))
        await until_waiting(g, 5)
        monkeypatch.setattr("proxy.intake.gate._LOOK_S", 3600.0)
        engines.busy = 0.0
        await until_waiting(g, 0)
    assert g.admission.requests == 0


async def test_who_is_parked_too_long_is_told_and_leaves_nothing() -> None:
    engines = Engines(busy=9.0)
    g = gate(9, requests=9, foresee=engines.foresee)
    with pytest.raises(TooLate, match=r"within 0\.05 s") as late:
        await g.enter(job(x_ttft_target="0.05"))
    assert (late.value.status, late.value.retry_after) == (429, 9.0)
    with pytest.raises(TooLate):
        await g.enter(job(x_ttft_target="0.005"))
    with pytest.raises(BadRequest):
        await g.enter(job(x_ttft_target="soon"))
    await engines.serve(g, job())
    await engines.serve(g, job(x_ttft_target="20"))
    assert (g.admission.requests, g.admission.waiting, g.admission.nbytes) == (0, 0, 0)


async def test_who_leaves_while_parked_leaves_nothing() -> None:
    engines = Engines(busy=9.0)
    g = gate(9, requests=9, foresee=engines.foresee, targets=Targets(first=5.0))
    parked = [asyncio.create_task(g.enter(job())) for _ in range(3)]
    await until_waiting(g, 3)
    for number, task in enumerate(parked, 1):
        task.cancel()
        await until_waiting(g, 3 - number)
    await asyncio.gather(*parked, return_exceptions=True)
    assert (g.admission.requests, g.admission.waiting, g.admission.wishing) == (0, 0, False)


async def test_who_finds_no_place_until_it_is_too_late_is_told_so() -> None:
    engines, left = Engines(), asyncio.Event()
    g = gate(9, 10.0, 1, engines.foresee)
    inside = asyncio.create_task(engines.serve(g, job(), left=left))
    await asyncio.sleep(0)
    with pytest.raises(TooLate, match=r"others wait before it, and idle engines would take 0\.01 s"):
        await g.enter(job(x_ttft_target="0.05"))
    left.set()
    await inside
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


async def test_media_wait_for_room_for_embeddings_as_long_as_for_a_place() -> None:
    engines = Engines()
    engines.room = False
    g = gate(9, 0.05, 9, engines.foresee, Targets(rooms=True))
    await engines.serve(g, job())
    with pytest.raises(QueueTimeout, match="--max-embedding-bytes"):
        await g.enter(job(media=True))
    engines.room = True
    await engines.serve(g, job(media=True))
    assert (g.admission.requests, g.admission.waiting) == (0, 0)


async def test_a_pace_that_does_not_come_back_is_refused_as_too_late() -> None:
    def slow(job: Job) -> Outlook:
        return Outlook(0.01, 0.01, 0.5, 0.01, Stage.PREFILL)

    g = gate(9, 0.05, 9, slow, Targets(inf, pace=0.1))
    for asked in (job(), job(x_ttft_target="5")):
        with pytest.raises(TooLate, match=r"every 0\.1 s \(--tpot-target\): now each would take 0\.5 s, and idle"):
            await g.enter(asked)
    assert (g.admission.requests, g.admission.waiting) == (0, 0)
