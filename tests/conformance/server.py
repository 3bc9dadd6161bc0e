"""Another project's server as a child process, on a free port, with its log in a file. It knows no proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench.scripted.candidates import free_port
from deploy.processes import die_with_parent

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 600.0
STOP_TIMEOUT = 30.0
LAST_LINES = 15


@dataclass
class Server:
    """One server of a tiny checkpoint `model`. Subclasses say what is run, and where its log is."""

    name: str
    model: Path
    port: int = field(default_factory=free_port, kw_only=True)
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        raise NotImplementedError

    def command(self) -> Sequence[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """What is added to this process's own."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns once it answers /health; after a `kill`, on the same port again.

        Raises AssertionError with the end of its log.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment()},
                start_new_session=True,  # what it starts can be killed with it
                preexec_fn=die_with_parent,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while not await self.healthy():
                    assert self.alive, f"{self.name} ended with {self._process.returncode}:\n{self.last_lines()}"
                    await asyncio.sleep(1.0)
        except TimeoutError:
            raise AssertionError(
                f"{self.name} did not serve within {START_TIMEOUT:g} s:\n{self.last_lines()}"
            ) from None

    async def healthy(self) -> bool:
        limit = aiohttp.ClientTimeout(total=20)
        try:
            async with aiohttp.ClientSession(timeout=limit) as http, http.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def signal(self, number: signal.Signals) -> None:
        """To it and everything that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def kill(self) -> None:
        """With -9, and everything that it has started."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    async def stop(self) -> None:
        """As a process manager would: a request first, then by force. Safe when it has ended, or never began."""
        if self.alive:
            assert self._process is not None
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT):
                    await self._process.wait()
        await self.kill()
