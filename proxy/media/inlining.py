"""Puts fetched media in the place of their URLs, so that engines fetch nothing: hashed and priced as if sent inline.

A URL that several requests of a tenant name at once is fetched once, and for a minute after that not again, as far as
its host allows and memory is set aside for it. Whoever leaves does not end a fetch that others may want.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias
from weakref import finalize

from proxy.core import Item, Job
from proxy.dialects.bodies import with_parts
from proxy.errors import BadRequest, Overloaded, TooLarge
from proxy.intake.limits import Limits
from proxy.media import splice
from proxy.media.addresses import Rules
from proxy.media.costs import Costs, price_of
from proxy.media.fetching import Fetched, Fetching
from proxy.media.splice import Cut
from proxy.openai import Identity, salt
from proxy.tasks import together

_AT_ONCE = 8  # URLs of one request: slow ones leave room for others' requests
_KEPT_S = 60.0
_OVERHEAD = 1 << 10  # bytes that what is kept costs besides its text and URL, at the most
_LARGE = 1 << 18  # bytes of base64; hashing more than this takes a millisecond and leaves the loop

Key: TypeAlias = tuple[bytes, str]
"""The salt of a tenant, and a URL."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of base64: for requests to come, for one request with its own, and for all that are not over. What one
    fetch brings comes on top of that."""

    kept: int
    request: int
    requests: int


class Inlining:
    """`async with running()` around its use."""

    def __init__(self, fetching: Fetching, memory: Memory, clock: Callable[[], float]) -> None:
        self._fetching = fetching
        self._shelf = Shelf(memory.kept)
        self._most = memory.request
        self._room = memory.requests + memory.kept
        self._held = 0  # bytes that are there, for whomever
        self._clock = clock
        self._flights: dict[Key, asyncio.Task[Fetched | BadRequest]] = {}

    def __repr__(self) -> str:
        return f"<Inlining {len(self._flights)} on their way, {self._held} bytes there, {self._shelf}>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._fetching.running():
            try:
                yield
            finally:
                flights = list(self._flights.values())
                for flight in flights:
                    flight.cancel()
                await asyncio.gather(*flights, return_exceptions=True)

    def go_by(self, rules: Rules) -> None:
        """Other rules from now on."""
        self._fetching.go_by(rules)

    async def inlined(self, job: Job, identity: Identity, costs: Costs, limits: Limits) -> Job:
        """`job` without URLs. Raises BadRequest naming the item, Overloaded."""
        named = {url: item for item in reversed(job.items) if (url := _url(item)) is not None}
        if not named:
            return job
        fetched: dict[str, Fetched] = {}
        left, places = self._most - job.nbytes, asyncio.Semaphore(_AT_ONCE)

        async def get(url: str, param: str) -> None:
            nonlocal left
            async with places:
                fetched[url] = await self._get((identity.salt, url), param)
            left -= len(fetched[url].text)
            if left < 0:
                told = f"with its media, the request has more than {self._most} bytes (--max-body-bytes)"
                raise TooLarge(told, param=param)

        async with together() as group:
            for url, item in reversed(named.items()):
                group.create_task(get(url, item.param))
        size = sum(len(one.text) for one in fetched.values())
        place = (job, fetched, identity, costs, limits)
        return await asyncio.to_thread(placed, *place) if size > _LARGE else placed(*place)

    async def _get(self, key: Key, param: str) -> Fetched:
        kept = self._shelf.find(key, self._clock())
        if kept is not None:
            return kept
        flight = self._flights.get(key)
        if flight is None:
            if self._held > self._room:
                raise Overloaded(
                    "media of requests that are not over fill the memory set aside (--max-bytes-in-flight)"
                )
            # Kept here until its end, which the limits of fetching bound.
            flight = self._flights[key] = asyncio.get_running_loop().create_task(self._fly(key))
            flight.add_done_callback(lambda _: self._flights.pop(key))
        outcome = await asyncio.shield(flight)
        if isinstance(outcome, BadRequest):
            # One for each who waits: a traceback holds the request that it came through.
            raise type(outcome)(outcome.message, param=param, code=outcome.code, retryable=outcome.retryable)
        return outcome

    async def _fly(self, key: Key) -> Fetched | BadRequest:
        try:
            got = await self._fetching.fetch(key[1])
        except BadRequest as error:
            error.settle()
            return error
        self._held += len(got.text)
        finalize(got.text, self._released, len(got.text)).atexit = False
        if got.lasting:
            self._shelf.keep(key, got, self._clock() + _KEPT_S)
        return got

    def _released(self, nbytes: int) -> None:
        """The last who held a text has let go of it."""
        self._held -= nbytes


class Shelf:
    """Fetched media by tenant and URL, of at most so many bytes: what was used longest ago gives way."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: dict[Key, tuple[Fetched, float]] = {}
        self._nbytes = 0

    def __repr__(self) -> str:
        return f"<Shelf {len(self._held)} of {self._nbytes} bytes>"

    def find(self, key: Key, now: float) -> Fetched | None:
        held = self._remove(key)
        if held is None or held[1] <= now:
            return None
        self._put(key, held)
        return held[0]

    def keep(self, key: Key, got: Fetched, until: float) -> None:
        self._remove(key)
        if _size(key, got) <= self._capacity:
            self._put(key, (got, until))
        while self._nbytes > self._capacity:
            self._remove(next(iter(self._held)))

    def _put(self, key: Key, held: tuple[Fetched, float]) -> None:
        self._held[key] = held
        self._nbytes += _size(key, held[0])

    def _remove(self, key: Key) -> tuple[Fetched, float] | None:
        held = self._held.pop(key, None)
        if held is not None:
            self._nbytes -= _size(key, held[0])
        return held


def _size(key: Key, got: Fetched) -> int:
    return len(got.text) + len(key[1]) + _OVERHEAD


def placed(job: Job, fetched: Mapping[str, Fetched], identity: Identity, costs: Costs, limits: Limits) -> Job:
    """`job` with these media in the place of their URLs. Raises TooLarge.

    Takes a fraction of a millisecond per megabyte. The text stays where it is: no copy is made, here or later.
    """
    key, vision = salt(job.body, identity), costs.vision(job.body)

    def here(item: Item) -> Item:
        got = fetched.get(_url(item) or "")
        if got is None:
            return item
        found = splice.digest(got.text, key)
        assert found is not None, "what was encoded here is strict base64"
        size = costs.size(item.modality, found, found.mm_hash)
        limits.check_size(size, item.param)
        tokens, work = price_of(vision, size)
        mm_hash = item.mm_hash or found.mm_hash  # a trusted client's own name for it
        kind, url = item.content["type"], Cut(got.prefix, got.text)
        value = item.content[kind]
        inline = {**value, "url": url} if isinstance(value, dict) else url
        return replace(
            item,
            content={**item.content, kind: inline, "uuid": mm_hash},
            mm_hash=mm_hash,
            identity=mm_hash,
            tokens=tokens,
            work=work,
            nbytes=tokens * vision.embedding_bytes,
        )

    items = tuple(map(here, job.items))
    nbytes = job.nbytes + sum(len(got.text) for got in fetched.values())
    with_media = replace(job, items=items, nbytes=nbytes, raw=b"")
    return replace(with_media, body=with_parts(with_media, lambda item: item.content))


def _url(item: Item) -> str | None:
    """Where an item's media are; None: in the request."""
    kind = item.content["type"]
    value = item.content[kind]
    if kind == "input_audio":
        return None
    url = value["url"] if isinstance(value, dict) else value
    return url if isinstance(url, str) and url[:5].lower() != "data:" else None
