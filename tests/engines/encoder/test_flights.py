"""Identical work happens once, and ends when nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engines.encoder.flights import Flight, Flights


class Work:
    """Work that waits to be told how to end."""

    def __init__(self, commit: bool = False) -> None:
        self.commit = commit
        self.started = 0
        self.cancelled = 0
        self.finish = asyncio.Event()

    async def __call__(self, flight: Flight[str]) -> str:
        self.started += 1
        if self.commit:
            flight.commit()
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return "landed"


def fails(error: Exception) -> Callable[[Flight[str]], Coroutine[Any, Any, str]]:
    async def work(_flight: Flight[str]) -> str:
        raise error

    return work


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def joined(flights: Flights[str], work: Work, count: int = 1) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(flights.join("k", work)) for _ in range(count)]
    await settle()
    return tasks


async def test_everyone_gets_the_one_result() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    tasks = await joined(flights, work, 3)
    assert (work.started, len(flights), "k" in flights) == (1, 1, True)
    work.finish.set()
    assert await asyncio.gather(*tasks) == ["landed"] * 3
    assert (len(flights), "k" in flights) == (0, False)


async def test_everyone_gets_the_one_error_and_the_next_starts_afresh() -> None:
    flights: Flights[str] = Flights()
    results = await asyncio.gather(
        *(flights.join("k", fails(ValueError("no"))) for _ in range(2)), return_exceptions=True
    )
    assert [str(result) for result in results] == ["no", "no"]
    work = Work()
    work.finish.set()
    assert await flights.join("k", work) == "landed"


async def test_one_who_leaves_leaves_the_others() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    first, second = await joined(flights, work, 2)
    first.cancel()
    await settle()
    assert work.cancelled == 0
    work.finish.set()
    assert await second == "landed"


async def test_the_last_one_to_leave_ends_the_work_and_a_newcomer_does_not_join_the_dying() -> None:
    flights: Flights[str] = Flights()
    work, fresh = Work(), Work()
    (only,) = await joined(flights, work)
    only.cancel()
    newcomer = asyncio.create_task(flights.join("k", fresh))
    await settle()
    assert (work.cancelled, fresh.started) == (1, 1)
    fresh.finish.set()
    assert await newcomer == "landed"


async def test_committed_work_goes_on_alone() -> None:
    flights: Flights[str] = Flights()
    work = Work(commit=True)
    (only,) = await joined(flights, work)
    only.cancel()
    await settle()
    assert (work.cancelled, len(flights)) == (0, 1)
    later = await joined(flights, work)
    assert work.started == 1, "whoever asks again joins it"
    work.finish.set()
    assert await later[0] == "landed"


async def test_an_error_that_nobody_waited_for_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    flights: Flights[str] = Flights()
    finish = asyncio.Event()

    async def work(flight: Flight[str]) -> str:
        flight.commit()
        await finish.wait()
        raise ValueError("unheard")

    task = asyncio.create_task(flights.join("k", work))
    await settle()
    task.cancel()
    await settle()
    finish.set()
    await settle()
    assert len(flights) == 0
    assert not caplog.records


async def test_close_cancels_what_it_can_and_waits_for_the_rest() -> None:
    flights: Flights[str] = Flights()
    committed, other = Work(commit=True), Work()
    tasks = [asyncio.create_task(flights.join(key, work)) for key, work in (("a", committed), ("b", other))]
    await settle()
    closing = asyncio.create_task(flights.close())
    await settle()
    assert (committed.cancelled, other.cancelled, closing.done()) == (0, 1, False)
    committed.finish.set()
    await closing
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[0] == "landed"
    assert isinstance(results[1], asyncio.CancelledError)


async def test_what_a_flight_tells_ahead_reaches_all_who_wait_and_those_who_come_later() -> None:
    flights: Flights[str] = Flights()
    landing = asyncio.Event()
    heard: list[str] = []

    async def work(flight: Flight[str]) -> str:
        flight.tell("soon")
        await landing.wait()
        return "landed"

    early = asyncio.create_task(flights.join("k", work, lambda said: heard.append(f"early {said}")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = asyncio.create_task(flights.join("k", work, lambda said: heard.append(f"late {said}")))
    deaf = asyncio.create_task(flights.join("k", work))
    await asyncio.sleep(0)
    assert heard == ["early soon", "late soon"]
    landing.set()
    assert await asyncio.gather(early, late, deaf) == ["landed"] * 3
