"""When requests are sent: at a rate, whatever becomes of earlier ones, or by clients that wait for their answers.

At a rate, a request's times count from when it was due. If the generator or the server's accept queue is late, that is
waiting which a user would have seen, and leaving it out would flatter an overloaded server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from bench.load.asking import Outcome
from bench.load.questions import Question

Ask = Callable[[Question, float], Awaitable[Outcome]]
"""Sends a question that was due at a time of `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """rate: requests per second, arriving as a Poisson process; None: as fast as `clients` get answers. clients: how
    many requests are open at the most; 0: any number. `requests` or `seconds` ends it, whichever is reached first."""

    requests: int
    seconds: float
    rate: float | None
    clients: int
    seed: int = 0


async def drive(pattern: Pattern, asked: Iterator[Question], ask: Ask, done: Callable[[Outcome], None]) -> float:
    """Seconds that it took; `done` hears of every outcome at its end."""
    began = time.monotonic()
    if pattern.rate is None:
        await _closed(pattern, asked, ask, done, began)
    else:
        await _open(pattern, pattern.rate, asked, ask, done, began)
    return time.monotonic() - began


async def _closed(
    pattern: Pattern, asked: Iterator[Question], ask: Ask, done: Callable[[Outcome], None], began: float
) -> None:
    left = iter(range(pattern.requests))

    async def client() -> None:
        while time.monotonic() - began < pattern.seconds and next(left, None) is not None:
            question = next(asked)
            done(await ask(question, time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(pattern.clients, pattern.requests)):
            group.create_task(client())


async def _open(
    pattern: Pattern, rate: float, asked: Iterator[Question], ask: Ask, done: Callable[[Outcome], None], began: float
) -> None:
    places = asyncio.Semaphore(pattern.clients) if pattern.clients else None

    async def one(question: Question, due: float) -> None:
        if places is None:
            done(await ask(question, due))
        else:
            async with places:
                done(await ask(question, due))

    async with asyncio.TaskGroup() as group:
        for offset in offsets(rate, pattern.seed, pattern.requests):
            if offset > pattern.seconds:
                break
            question, due = next(asked), began + offset
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(one(question, due))


def offsets(rate: float, seed: int, count: int) -> Iterator[float]:
    """When each of `count` requests is due, in seconds from the start."""
    dice, at = random.Random(seed), 0.0
    for _ in range(count):
        yield at
        at += dice.expovariate(rate)
