"""Arrivals: how many are open at once, when they are due, and what ends a run. A clock that lies is no part of it."""

from __future__ import annotations

import asyncio
from itertools import pairwise, repeat
from math import inf
from statistics import fmean

from bench.load.arrivals import Pattern, drive, offsets
from bench.load.asking import Outcome
from bench.load.questions import Question

QUESTION = Question("text", b"{}")


class Server:
    """Answers when it is let; counts who is waiting."""

    def __init__(self) -> None:
        self.open = self.most = 0
        self.dues: list[float] = []
        self.go = asyncio.Event()

    async def ask(self, question: Question, due: float) -> Outcome:
        self.open += 1
        self.most = max(self.most, self.open)
        self.dues.append(due)
        await self.go.wait()
        self.open -= 1
        return Outcome(question.kind, due)


async def test_a_closed_loop_has_one_request_a_client() -> None:
    server, done = Server(), []  # type: ignore[var-annotated]
    run = asyncio.create_task(drive(Pattern(10, inf, None, 3), repeat(QUESTION), server.ask, done.append))
    while server.open < 3:
        await asyncio.sleep(0)
    assert not done
    server.go.set()
    await run
    assert (server.most, len(done)) == (3, 10)


async def test_at_a_rate_requests_are_sent_whatever_becomes_of_earlier_ones() -> None:
    server, done = Server(), []  # type: ignore[var-annotated]
    run = asyncio.create_task(drive(Pattern(20, inf, 1e6, 0), repeat(QUESTION), server.ask, done.append))
    while server.open < 20:
        await asyncio.sleep(0)
    server.go.set()
    await run
    assert (server.most, len(done)) == (20, 20)


async def test_at_a_rate_with_few_places_the_wait_for_one_counts() -> None:
    server, done = Server(), []  # type: ignore[var-annotated]
    server.go.set()
    await drive(Pattern(5, inf, 1e6, 1), repeat(QUESTION), server.ask, done.append)
    due = [at - server.dues[0] for at in server.dues]
    assert server.most == 1
    assert due == sorted(due) and due[-1] < 1e-4  # when it was due, not when it had its turn


async def test_seconds_end_a_run_too() -> None:
    server, done = Server(), []  # type: ignore[var-annotated]
    server.go.set()
    await drive(Pattern(1000, 0.0, None, 4), repeat(QUESTION), server.ask, done.append)
    await drive(Pattern(1000, 0.0, 5.0, 0), repeat(QUESTION), server.ask, done.append)
    assert len(done) == 1  # the first of a rate is due at once


def test_offsets_are_a_poisson_process_that_a_seed_repeats() -> None:
    found = list(offsets(4.0, 3, 4000))
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert found[0] == 0 and found == list(offsets(4.0, 3, 4000)) != list(offsets(4.0, 4, 4000))
    assert abs(fmean(gaps) - 0.25) < 0.02
    assert abs(fmean(gap * gap for gap in gaps) - 2 * 0.25**2) < 0.02  # exponential: the second moment
