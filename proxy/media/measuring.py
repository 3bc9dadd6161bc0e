"""Asks for the first bytes of media behind URLs, so that their size is known before a plan is drawn.

It is an optimisation and no more: whatever goes wrong, an item keeps the price that it has. No redirect is followed,
and of no URL are more than 64 KiB read.

This lets clients make the proxy connect to hosts that they name. With a `Resolver`, only addresses that media may come
from are connected to. Without one, any address is: right where encoders would fetch from there too, and reach no less
than the proxy does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

from proxy.core import Item, Job
from proxy.errors import ForbiddenMedia
from proxy.http.client import Client, ConnectFailed, Cut, Exchange, Late
from proxy.media import formats
from proxy.media.addresses import Rules
from proxy.media.costs import Costs
from proxy.media.formats import Shape
from proxy.media.resolving import Resolver
from proxy.tasks import together

_HEAD = 64 << 10  # bytes
_MOST = 16  # URLs of one request
_URL = re.compile(r"https?://[!-~]{1,2000}")  # no space, no end of a line: it becomes one
_FIELDS = f"range: bytes=0-{_HEAD - 1}\r\naccept-encoding: identity\r\nuser-agent: triptych\r\n"
_TOTAL = re.compile(r"bytes 0-\d+/(\d{1,18})")


class Measuring:
    """What it finds is kept in `costs.sizes`, and failures too: nobody is asked twice."""

    def __init__(self, costs: Costs, seconds: float, resolver: Resolver | None) -> None:
        """`seconds`: that a request waits for all its media together, at the most. `resolver`: None takes any host."""
        self._costs = costs
        self._seconds = seconds
        self._resolver = resolver
        self._client = Client(seconds, resolver, idle=_MOST)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._client.open()
        try:
            yield
        finally:
            await self._client.close()
            if self._resolver is not None:
                self._resolver.close()

    def go_by(self, rules: Rules) -> None:
        """Other rules from now on."""
        if self._resolver is not None:
            self._resolver.rules = rules

    async def measured(self, job: Job) -> Job:
        """`job` with the prices of media that could be measured."""
        asked = {i.identity: i for i in job.items if i.mm_hash is None and self._unknown(i.identity)}
        if not asked:
            return job
        await self._learn(list(asked.values())[:_MOST])
        vision = self._costs.vision(job.body)

        def priced(item: Item) -> Item:
            if item.identity not in asked:
                return item
            tokens, work = self._costs.price(vision, item.modality, None, item.identity)
            return replace(item, tokens=tokens, work=work, nbytes=tokens * vision.embedding_bytes)

        return replace(job, items=tuple(map(priced, job.items)))

    def _unknown(self, url: str) -> bool:
        return self._costs.sizes.find(url) is None and _URL.fullmatch(url) is not None

    async def _learn(self, items: Sequence[Item]) -> None:
        async def ask(item: Item) -> None:
            shape = Shape(item.modality)
            try:
                shape = await self._shape(item)
            finally:
                self._costs.sizes.measured(item, shape)

        try:
            async with asyncio.timeout(self._seconds), together() as group:
                for item in items:
                    group.create_task(ask(item))
        except TimeoutError:
            pass

    async def _shape(self, item: Item) -> Shape:
        try:
            parts = urlsplit(item.identity)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            async with self._client.request("GET", f"{parts.scheme}://{parts.netloc}", path, _FIELDS) as answer:
                data = await _head(answer)
                total = _total(answer)
        except (ConnectFailed, Cut, Late, ForbiddenMedia, ValueError):
            return Shape(item.modality)
        return formats.measure(item.modality, data, max(total, len(data))) if data else Shape(item.modality)


async def _head(answer: Exchange) -> bytes:
    """The first bytes of a body that may be far longer; empty of one that is none."""
    data = b""
    while answer.status in (200, 206) and len(data) < _HEAD and (piece := await answer.chunk()):
        data += piece
    return data[:_HEAD]


def _total(answer: Exchange) -> int:
    """Bytes of the whole, as far as is told."""
    found = _TOTAL.fullmatch(answer.header("content-range"))
    length = answer.header("content-length")
    return int(found[1]) if found else int(length) if answer.status == 200 and length.isdecimal() else 0
