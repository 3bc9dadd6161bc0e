"""Rank 0's hold on the processes of the other ranks: it starts them, asks them, watches them, and ends them. What they
do is in `rank`.

They live as long as rank 0, and it lives as long as they do: none can run a step alone, so the first that dies, or
gives no sign of life for --rank-timeout, ends the engine.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from engines.errors import Fatal, SetupError, ShuttingDown
from engines.language.engine import Runner as Steppable
from engines.language.parallel.carrier import every
from engines.language.parallel.group import Alone, Group, Processes
from engines.language.parallel.messages import Answered, Asked, Begin, Cancel, Connect, Freed, Ping, Question, Said
from engines.language.parallel.steps import KVStore, ParallelCache, ParallelRunner, Steps
from engines.language.parallel.wire import Line, Wire
from engines.language.runner import Runner
from engines.settings import LanguageSettings
from engines.transfer.messages import as_error

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WORDS = 120.0  # seconds for a process to begin
END_TIMEOUT = 5.0  # seconds for a rank to end by itself
POLL = 0.02  # seconds
LAST_WORDS = 0.5  # seconds in which the process of a rank that broke a step turns out to be dead


def device_of(first: str, rank: int) -> str:
    """The device of a rank, from that of rank 0.

    >>> device_of("cuda:2", 1), device_of("cuda", 1), device_of("cpu", 1)
    ('cuda:3', 'cuda:1', 'cpu')
    """
    kind, _, index = first.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(index or 0) + rank}"


class Link:
    """Rank 0's way to one other rank: its process, and questions to its loop."""

    def __init__(self, rank: int, settings: LanguageSettings) -> None:
        self.rank = rank
        self._settings = settings
        steps, its_steps = socket.socketpair()
        self._control, its_control = socket.socketpair()
        self.wire = Wire(steps, settings.rank_timeout)
        ends = (its_steps.fileno(), its_control.fileno())
        command = [sys.executable, "-m", "engines.language.parallel", *map(str, ends)]
        # a session of its own: Ctrl-C is for rank 0, which ends the others when it is done
        self.process = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, start_new_session=True)
        its_steps.close()
        its_control.close()
        self._ids = count()
        self._line: Line[Said] | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._freed: dict[int, Callable[[], None]] = {}
        self._gone: str | None = None

    def __repr__(self) -> str:
        return f"<rank {self.rank} pid {self.process.pid}{' gone' if self._gone else ''}>"

    async def listen(self) -> None:
        """Take what the rank says, until it is gone. `opened` before the first question."""
        assert self._line is not None
        with suppress(EOFError):
            while True:
                match await self._line.receive():
                    case Answered() as answered:
                        self._take(answered)
                    case Freed(key):
                        self._freed.pop(key, lambda: None)()  # a publication may end while it is released
        self._gone = f"rank {self.rank} is gone"
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ShuttingDown(self._gone))

    async def opened(self) -> None:
        self._line = await Line[Said].on(self._control, Said)

    async def ask(self, question: Question) -> dict[str, Any]:
        if self._gone is not None:
            raise ShuttingDown(self._gone)
        asked = Asked(next(self._ids), question)
        future = self._answers[asked.id] = asyncio.get_running_loop().create_future()
        self._send(asked)
        try:
            value: dict[str, Any] = await future
            return value
        except asyncio.CancelledError:
            self.tell(Cancel(asked.id))
            raise
        finally:
            del self._answers[asked.id]

    def tell(self, question: Question) -> None:
        self._send(Asked(next(self._ids), question))

    def on_freed(self, key: int, call: Callable[[], None]) -> None:
        self._freed[key] = call

    def begin(self) -> Begin:
        names = set(LanguageSettings.model_fields) - {"proxies", "register_key", "key"}
        own = self._settings.model_copy(update={"device": device_of(self._settings.device, self.rank)})
        return Begin(self.rank, own.model_dump_json(include=names).encode())

    async def ended(self, timeout: float) -> bool:
        """Whether its process ends within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, timeout)
        return self.process.poll() is not None

    def how_it_ended(self) -> str:
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"rank {self.rank} (pid {self.process.pid}) {how}"

    def close(self) -> None:
        self.wire.close()
        if self._line is not None:
            self._line.close()
        else:
            self._control.close()

    def _send(self, asked: Asked) -> None:
        if self._line is not None and self._gone is None:
            self._line.send(asked)

    def _take(self, answered: Answered) -> None:
        future = self._answers.get(answered.id)
        if future is None or future.done():
            return
        if answered.fatal is not None:
            future.set_exception(SetupError(f"rank {self.rank}: {answered.fatal}"))
        elif answered.refused is not None:
            future.set_exception(as_error(answered.refused))
        else:
            future.set_result(answered.value or {})


class Ranks:
    """All ranks of an engine but the first: none, unless it has several. Loop only."""

    def __init__(self, settings: LanguageSettings) -> None:
        self._timeout = settings.rank_timeout
        self._loop = asyncio.get_running_loop()
        self._connected = False
        self._failed: asyncio.Future[str] = self._loop.create_future()
        size = settings.tensor_parallel
        self._processes = Processes(0, size, settings.rank_timeout) if size > 1 else None
        self.links = [Link(rank, settings) for rank in range(1, size)]
        self.steps = Steps([link.wire for link in self.links], self._on_failure)

    @property
    def group(self) -> Group:
        return self._processes or Alone()

    def leading(self, cache: KVStore, runner: Runner) -> tuple[KVStore, Steppable]:
        """Rank 0's own cache and runner made those of all ranks."""
        if self._processes is None:
            return cache, runner
        return ParallelCache(cache, self.steps), ParallelRunner(runner, self.steps, self._processes)

    async def load(self) -> None:
        """Have them load their weights; rank 0 does so at the same time. Raises SetupError."""
        await self._all(lambda link: link.begin())

    async def connect(self, device: torch.device, make: Callable[[], T]) -> T:
        """Have all ranks meet, and each `make` then what it runs steps with, which may take a step or two of all of
        them; `make` is rank 0's, and called in a thread. Raises SetupError.
        """
        processes = self._processes
        if processes is None:
            return await asyncio.to_thread(make)
        self._connected = True

        def meet() -> T:
            processes.connect(meeting, device)
            return make()

        with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
            meeting = Path(folder) / "meeting"
            try:
                made, _ = await every([asyncio.to_thread(meet), self._all(lambda _: Connect(str(meeting)))])
            except RuntimeError as error:
                raise SetupError(f"the ranks do not meet: {error}") from None
        return made  # type: ignore[no-any-return]

    async def _all(self, question: Callable[[Link], Question]) -> None:
        try:
            await every(self._answer(link, question(link)) for link in self.links)
        except ShuttingDown as error:
            raise SetupError(f"{await self._lost() or error.message} while it started") from None

    async def _answer(self, link: Link, question: Question) -> None:
        """Ask, and ask for signs of life until the answer comes. The first may take a while: it has yet to import."""
        await self._ping(link, FIRST_WORDS)
        try:
            async with asyncio.TaskGroup() as group:
                alive = group.create_task(self._alive(link))
                await link.ask(question)
                alive.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Within, the first rank that fails cancels the block, and Fatal is raised in its place."""
        if self._processes is None:
            yield
            return
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch())
                yield
                watch.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _watch(self) -> None:
        await every([self._failure(), *(self._guard(link) for link in self.links)])

    async def _guard(self, link: Link) -> None:
        try:
            await self._alive(link)
        except ShuttingDown as error:
            self.steps.end(error.message)

    async def _failure(self) -> None:
        """Until a step failed, or a rank is lost."""
        reason = await self._failed
        if self._processes is not None:
            self._processes.abort()  # the model thread may wait for a rank that will not come
        told = f"{await self._lost() or reason}: an engine cannot go on without all of its {1 + len(self.links)} ranks"
        log.critical(told)
        raise Fatal(told)

    async def _lost(self) -> str | None:
        """Which rank it is, and how it was lost."""
        if (ended := await self._ended()) is not None:
            return ended
        answers = await asyncio.gather(*(self._ping(link, LAST_WORDS) for link in self.links), return_exceptions=True)
        silent = (link for link, answer in zip(self.links, answers, strict=True) if answer is not None)
        return next((f"rank {link.rank} (pid {link.process.pid}) does not answer" for link in silent), None)

    async def _alive(self, link: Link) -> None:
        """Ask for signs of life until there is none. Raises ShuttingDown."""
        while True:
            await self._ping(link, self._timeout)
            await asyncio.sleep(self._timeout / 4)

    async def _ping(self, link: Link, timeout: float) -> None:
        """Raises ShuttingDown."""
        try:
            async with asyncio.timeout(timeout):
                await link.ask(Ping())
        except TimeoutError:
            raise ShuttingDown(f"rank {link.rank} gave no sign of life for {timeout:g} s") from None

    async def _ended(self) -> str | None:
        """How the first rank ended whose process did, or is just doing so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while True:
                    for link in self.links:
                        if link.process.poll() is not None:
                            return link.how_it_ended()
                    await asyncio.sleep(POLL)
        return None

    def _on_failure(self, reason: str) -> None:
        def fail() -> None:
            if not self._failed.done():
                self._failed.set_result(reason)

        self._loop.call_soon_threadsafe(fail)

    async def close(self) -> None:
        """End them: by themselves where they have something to leave in order, else the hard way."""
        for link in self.links:
            link.close()
        for link in self.links:
            if not await link.ended(END_TIMEOUT if self._connected and not self._failed.done() else 0):
                link.process.kill()
                await link.ended(END_TIMEOUT)


@asynccontextmanager
async def started(settings: LanguageSettings) -> AsyncIterator[Ranks]:
    """The processes of all ranks but this one. They end with the block."""
    ranks = Ranks(settings)
    listening: list[asyncio.Task[None]] = []
    try:
        for link in ranks.links:
            await link.opened()
            listening.append(asyncio.create_task(link.listen()))  # noqa: TID251 - ended below
        yield ranks
    finally:
        await ranks.close()
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
