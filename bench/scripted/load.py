"""A closed loop of clients: each sends its requests one after the other, on a connection of its own.

The starts are spread over `spread` seconds, so that streams of many clients do not tick together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.scripted import answers
from bench.scripted.client import Answer, Client
from bench.scripted.verdict import Verdict, judge


@dataclass(frozen=True, slots=True)
class Workload:
    """`clients` at once, each sending `body` `each` times; the whole answer has `tokens` tokens."""

    name: str
    body: bytes
    stream: bool
    tokens: int
    clients: int
    each: int
    spread: float = 0.0
    timeout: float = 60.0

    @property
    def requests(self) -> int:
        return self.clients * self.each


class NotServed(Exception):
    """An answer was not the whole one: figures of such a run would mean nothing."""


@asynccontextmanager
async def connected(url: str, count: int) -> AsyncIterator[list[Client]]:
    """`count` clients of `url`, connected and warm: each has had one small answer."""
    clients = [Client(url) for _ in range(count)]
    try:
        hello = answers.request("hello", 1, stream=False)
        warm = await asyncio.gather(*(client.post(answers.CHAT, hello, timeout=30) for client in clients))
        for answer in warm:
            check(answer, "hello", 1, stream=False)
        yield clients
    finally:
        for client in clients:
            client.close()


async def drive(clients: Sequence[Client], workload: Workload) -> list[Answer]:
    """Every answer of the run. Raises NotServed."""

    async def one(number: int, client: Client) -> list[Answer]:
        await asyncio.sleep(workload.spread * number / len(clients))
        got = []
        for _ in range(workload.each):
            got.append(await client.post(answers.CHAT, workload.body, timeout=workload.timeout))
        return got

    got = await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))
    found = [answer for per_client in got for answer in per_client]
    for answer in found:
        check(answer, answers.tag_of(workload.body), workload.tokens, stream=workload.stream)
    return found


def check(answer: Answer, tag: str, tokens: int, *, stream: bool) -> None:
    """Raises NotServed."""
    verdict = judge(answer, answers.text(tag, tokens), stream=stream)
    if verdict is not Verdict.SERVED:
        raise NotServed(f"{verdict}: status {answer.status}, {answer.ending.name}, {answer.body[-300:]!r}")
