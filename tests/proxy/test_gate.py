"""Waiting for a place: cancelled, timed out, pushed out, stopped; the place is never lost."""

from __future__ import annotations

import asyncio

import pytest

from proxy.admission import Admission, Limits
from proxy.errors import Overloaded, ProxyError, QueueTimeout, ShuttingDown
from proxy.gate import Gate
from proxy.metrics import Metrics


def gate(queue: int = 2, patience: float = 10.0) -> Gate:
    return Gate(Admission(Limits(1, 100, queue, patience)), Metrics())


async def visit(gate: Gate, left: asyncio.Event, priority: int = 0) -> None:
    entry = await gate.enter(priority, 1)
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


@pytest.mark.parametrize("how", ["late", "pushed", "stopped"])
async def test_who_waits_in_vain_is_told_why(how: str) -> None:
    g, left = gate(queue=1, patience=0.05 if how == "late" else 10.0), asyncio.Event()
    inside = asyncio.create_task(visit(g, left))
    waiting = asyncio.create_task(visit(g, left, priority=3))
    await until_waiting(g, 1)
    urgent = asyncio.create_task(visit(g, left, priority=0)) if how == "pushed" else None
    if how == "stopped":
        g.close()
        with pytest.raises(ShuttingDown):
            await visit(g, left)
    errors: dict[str, type[ProxyError]] = {"late": QueueTimeout, "pushed": Overloaded, "stopped": ShuttingDown}
    with pytest.raises(errors[how]):
        await waiting
    left.set()
    await asyncio.gather(inside, *filter(None, [urgent]))
    assert (g.admission.requests, g.admission.waiting) == (0, 0)
