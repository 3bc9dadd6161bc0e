"""Engines and proxies as child processes: start, wait until they serve, stop; nothing of them is imported.

A child prints `READY <url>` on its standard output once it can serve. Whatever else it prints, on either stream, goes
to its log. A child never outlives its parent, even one that is killed with -9 (Linux only; elsewhere an orphan has to
be ended by hand).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence

PR_SET_PDEATHSIG = 1
LAST_LINES = 30
LONGEST_LINE = 1 << 20
READY = "READY "

Log = Callable[[str, str], None]


class StartError(Exception):
    """A child ended, or stayed silent, before it was ready. The message carries its last lines."""


def die_with_parent() -> None:
    """Runs in the child between fork and exec: the kernel ends it when the parent's thread is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


async def spawn(command: Sequence[str]) -> asyncio.subprocess.Process:
    """`command` as a process whose output is read here."""
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=die_with_parent,
        limit=LONGEST_LINE,
    )


class Child:
    """One `python -m MODULE ARGUMENTS` that serves a URL.

    :param name: how logs call it, e.g. `prefill-0`.
    :param log: called with (name, line) for each line it prints.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Log | None = None) -> None:
        self.name = name
        self.url = ""
        self._command = [sys.executable, "-m", module, *arguments]
        self._log = log
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()

    def __repr__(self) -> str:
        code = self.returncode
        state = "new" if self._process is None else f"exited {code}" if code is not None else f"pid {self.pid}"
        return f"<Child {self.name} {state} {self.url}>"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.returncode

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def last_lines(self) -> str:
        return "\n".join(self._lines)

    async def start(self, timeout: float = 120.0) -> str:
        """Start, and return the URL once it is ready.

        :raises StartError: it ended or was not ready in `timeout` seconds; it is gone then.
        """
        self._ready.clear()
        self._process = await spawn(self._command)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            task = asyncio.create_task(self._read(stream))  # noqa: TID251 - kept in _readers, awaited in _reap
            self._readers.add(task)
        try:
            async with asyncio.timeout(timeout):
                await self._first_of_ready_and_exit()
        except TimeoutError:
            await self.stop(grace=0)
            raise StartError(f"{self.name} was not ready after {timeout:.0f} s:\n{self.last_lines}") from None
        if not self._ready.is_set():
            await self._reap()
            raise StartError(f"{self.name} ended with {self.returncode}:\n{self.last_lines}")
        return self.url

    async def _first_of_ready_and_exit(self) -> None:
        assert self._process is not None
        waits = [asyncio.create_task(self._ready.wait()), asyncio.create_task(self._process.wait())]  # noqa: TID251 - below
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            if line.startswith(READY):
                self.url = line.removeprefix(READY).strip()
                self._ready.set()
                continue
            self._lines.append(line)
            if self._log is not None:
                self._log(self.name, line)

    async def wait(self) -> int:
        """Wait until it ends by itself; its exit status."""
        assert self._process is not None
        code = await self._process.wait()
        await self._reap()
        return code

    def keep_port(self) -> None:
        """The next start uses the port of the last one, whatever `--port` said."""
        where = self._command.index("--port")
        self._command[where + 1] = str(self.port)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended already."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, grace: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL after `grace` seconds; the exit status. Safe to call twice and on a stopped process."""
        if self._process is None:
            return None
        self.signal(signal.SIGCONT)
        if grace > 0:
            self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._process.wait()
        await self._reap()
        return self._process.returncode

    async def _reap(self) -> None:
        if self._process is not None:
            await self._process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._readers.clear()
