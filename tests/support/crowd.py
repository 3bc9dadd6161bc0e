"""The proxy's command with several workers, as processes, and what the kernel says of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import eventually, until


@dataclass
class Crowd:
    """Every call goes over a connection of its own, so to any worker."""

    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession

    def workers(self) -> list[int]:
        """The pids of the supervisor's children; none once it is gone."""
        try:
            listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in listed.split() if running(int(pid))]

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def chat(self, body: Any) -> int:
        """The status; 0 if the connection broke."""
        try:
            return (await self.post("/v1/chat/completions", body))[0]
        except aiohttp.ClientError:
            return 0

    async def get(self, path: str) -> Any:
        async with self.http.get(self.url + path) as response:
            return await response.json(content_type=None)

    async def instances(self) -> dict[str, dict[str, Any]]:
        return {shown["url"]: shown for shown in (await self.get("/instances"))["instances"]}

    async def leases(self) -> int:
        return sum(shown["leases"] for shown in (await self.instances()).values())

    async def metrics(self) -> dict[tuple[str, ...], float]:
        async with self.http.get(self.url + "/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    async def states(self, state: str) -> None:
        """Wait until every instance is in `state`."""

        async def so() -> bool:
            try:
                return all(shown["state"] == state for shown in (await self.instances()).values())
            except aiohttp.ClientError:
                return False  # it was a worker that died, or the kernel dealt ports anew for one that began

        await eventually(so, 20)

    async def stop(self) -> int:
        """Send SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            return await self.process.wait()


def running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def maps(pid: int) -> list[str]:
    """What a process has mapped. What it never had in /dev/shm it cannot leave there."""
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


@contextlib.asynccontextmanager
async def crowd(folder: Path, workers: int, *argv: str) -> AsyncIterator[Crowd]:
    """A proxy that is ready on a free port. Leaving it checks that neither process nor file is left; `folder` is where
    it may put some."""
    command = (sys.executable, "-m", "proxy", "--host", "127.0.0.1", "--port", "0", "--workers", str(workers))
    process = await asyncio.create_subprocess_exec(
        *(*command, "--probe-interval", "0.2", "--log-level", "warning", *argv),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    pids: list[int] = []
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            word, url = (await process.stdout.readline()).decode().split()
        assert word == "READY"
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            found = Crowd(process, url, http)
            assert len(found.workers()) == (workers if workers > 1 else 0)
            assert not any("/dev/shm" in mapped for pid in [process.pid, *found.workers()] for mapped in maps(pid))
            await found.states("READY")
            yield found
            pids = found.workers()
        if process.returncode is None:
            assert await found.stop() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
    await until(lambda: not any(running(pid) for pid in pids))
    await until(lambda: not list(folder.iterdir()))
