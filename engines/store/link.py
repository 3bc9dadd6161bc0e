"""The process that talks to the store, from outside: started, asked with deadlines, killed when it does not answer, and
started again after a while. It knows no embedding.

One `Client` is one life of that process, with a slab of its own: whatever a lost call might still write, nobody reads.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count, cycle

import msgspec

from engines.errors import SetupError
from engines.ranges import Ranges
from engines.store.client import CONNECTED, FIRST_QUESTION, LOADED, Answer, Question, Verb

log = logging.getLogger(__name__)

MISSING = -704
REFUSALS = frozenset({-200, -600, MISSING, -705, -706})
"""No room, another size than it was, not there, there already, in use: after these nothing goes on."""
LOAD_SECONDS, CONNECT_SECONDS = 30.0, 10.0
PATIENCE = 10.0
"""Seconds beyond its deadline after which a call is given up, and its client with it."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the next life; twice as many after each one that was of no use."""


class StoreLost(Exception):
    """The store did not answer in time, or with an error after which nothing is certain and its client is ended."""


class Span:
    """A range of a slab. Given back when its block is over and no call uses it any more."""

    def __init__(self, ranges: Ranges, offset: int, view: memoryview) -> None:
        self.offset, self.view = offset, view
        self._ranges, self._users = ranges, 1

    def hold(self) -> None:
        self._users += 1

    def drop(self, _: object = None) -> None:
        self._users -= 1
        if not self._users:
            self._ranges.give_back(self.offset)


class Client:
    """One life of the process. `useful`: it has moved rows. `late`: calls beyond their deadline; better ask no more."""

    def __init__(self, nbytes: int) -> None:
        self.ranges = Ranges(nbytes)
        self.useful = False
        self.late = 0
        self._over = False
        self._fd = os.memfd_create("triptych-store")
        os.ftruncate(self._fd, nbytes)
        self._memory = memoryview(mmap.mmap(self._fd, nbytes))
        self._ids = count(FIRST_QUESTION)
        self._waiting: dict[int, asyncio.Future[Answer | None]] = {}
        self._process: asyncio.subprocess.Process | None = None

    @asynccontextmanager
    async def running(self, master: str, host: str, protocol: str) -> AsyncIterator[Client]:
        """The process, loaded and perhaps not connected yet; gone when the block is left.

        Raises SetupError when Mooncake cannot be loaded.
        """
        arguments = [master, host, protocol, str(self._fd), str(len(self._memory))]
        loaded, self.connected = self._expect(LOADED), self._expect(CONNECTED)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "engines.store.client", *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[self._fd],
            )
        finally:
            os.close(self._fd)  # the mapping stays, and the process has its own
        reading = asyncio.create_task(self._read())  # noqa: TID251 - ends below
        try:
            await self._loaded(loaded)
            yield self
        finally:
            self.kill()
            await self._process.wait()
            await reading

    async def _loaded(self, loaded: asyncio.Future[Answer | None]) -> None:
        answer = await _within(LOAD_SECONDS, loaded)
        if answer is None or answer.result < 0:
            raise SetupError(
                f"--embedding-store: Mooncake cannot be loaded: {answer.text if answer else 'its process ended'}. "
                "Install it with `pip install 'triptych[mooncake]'` and its libraries with "
                "`apt-get install libibverbs1 libnuma1 libcurl4`"
            )

    @contextmanager
    def span(self, nbytes: int) -> Iterator[Span | None]:
        """A range of the slab, or None when there is no room now."""
        offset = self.ranges.take(nbytes)
        if offset is None:
            yield None
            return
        span = Span(self.ranges, offset, self._memory[offset : offset + nbytes])
        try:
            yield span
        finally:
            span.drop()

    async def ask(self, verb: Verb, key: str, timeout: float, span: Span | None = None) -> int:
        """The result of a call: bytes, 0, or one of REFUSALS. Raises StoreLost.

        Whoever is cancelled need not care for `span`: it stays taken until the call is over.
        """
        question = Question(next(self._ids), verb, key)
        if span is not None:
            question = msgspec.structs.replace(question, offset=span.offset, nbytes=len(span.view))
        assert self._process is not None and self._process.stdin is not None
        if self._over or self._process.stdin.is_closing():
            raise StoreLost("its client ended")
        answered = self._expect(question.id)
        if span is not None:
            span.hold()
            answered.add_done_callback(span.drop)
        self._process.stdin.write(msgspec.json.encode(question) + b"\n")
        answer = await _within(timeout, answered)
        if not answered.done():
            self._is_late(answered)
            raise StoreLost(f"no answer to {verb} within {timeout:.3g} s")
        if answer is None:
            raise StoreLost("its client ended")
        if not _settled(answer):
            raise StoreLost(f"{verb} failed with {answer.result}")
        self.useful = self.useful or (span is not None and answer.result >= 0)
        return answer.result

    def _is_late(self, answered: asyncio.Future[Answer | None]) -> None:
        self.late += 1
        giving_up = asyncio.get_running_loop().call_later(PATIENCE, self.kill)

        def came(_: object) -> None:
            self.late -= 1
            giving_up.cancel()

        answered.add_done_callback(came)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            assert self._process is not None
            self._process.kill()

    async def ended(self) -> None:
        assert self._process is not None
        await self._process.wait()

    def _expect(self, id: int) -> asyncio.Future[Answer | None]:
        self._waiting[id] = asyncio.get_running_loop().create_future()
        return self._waiting[id]

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        async for line in self._process.stdout:
            answer = msgspec.json.decode(line, type=Answer)
            self._waiting.pop(answer.id).set_result(answer)
            if not _settled(answer):
                self.kill()
        self._over = True
        for future in self._waiting.values():
            future.set_result(None)


def _settled(answer: Answer) -> bool:
    """Whether nothing goes on after it."""
    return answer.result >= 0 or answer.result in REFUSALS


async def _within(seconds: float, answered: asyncio.Future[Answer | None]) -> Answer | None:
    """None: it has not come, and perhaps it still will, or the process has ended."""
    await asyncio.wait([answered], timeout=seconds)
    return answered.result() if answered.done() else None


class Link:
    """Always a client, or soon another one. `masters` are tried in turn."""

    def __init__(self, masters: Sequence[str], host: str, protocol: str, nbytes: int) -> None:
        self._client: Client | None = None
        self._masters = masters
        self._host, self._protocol, self._nbytes = host, protocol, nbytes

    @property
    def client(self) -> Client | None:
        """None while there is none that answers in time."""
        return None if self._client is None or self._client.late else self._client

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Link]:
        """Returns before any master has answered. Raises SetupError when Mooncake cannot be loaded."""
        loaded = asyncio.Event()
        keeping = asyncio.create_task(self._keep(loaded))  # noqa: TID251 - ends below
        try:
            waiting = asyncio.create_task(loaded.wait())  # noqa: TID251 - ends below
            await asyncio.wait([waiting, keeping], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if keeping.done():
                keeping.result()
            yield self
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep(self, loaded: asyncio.Event) -> None:
        pause = FIRST_PAUSE
        for master in cycle(self._masters):
            try:
                async with Client(self._nbytes).running(master, self._host, self._protocol) as client:
                    loaded.set()
                    if await self._live(client, master):
                        pause = FIRST_PAUSE
            except (SetupError, OSError) as error:
                if not loaded.is_set():
                    raise
                log.warning("%s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _live(self, client: Client, master: str) -> bool:
        """Until the client is lost; whether it was of use."""
        answer = await _within(CONNECT_SECONDS, client.connected)
        if answer is None or answer.result < 0:
            log.warning("the embedding store at %s does not answer", master)
            return False
        log.info("connected to the embedding store at %s", master)
        self._client = client
        try:
            await client.ended()
        finally:
            self._client = None
        return client.useful
