"""A real vLLM server as a child process, on a free port, with its log in a file. It knows no proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deploy.processes import die_with_parent

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / ".conformance" / "vllm"
START_TIMEOUT = 600.0
LAST_LINES = 15
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CACHE_ROOT": str(FOLDER / "cache"),
    "PYTHONPATH": str(ROOT),  # where --ec-transfer-config finds our connector
}
ARGUMENTS = (
    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
    *("--no-enable-prefix-caching", "--max-num-batched-tokens", "8192", "--max-model-len", "4096"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Vllm:
    """One server. `ec`, `kv`: its transfer configurations."""

    name: str
    model: Path
    ec: Mapping[str, Any] | None = None
    kv: Mapping[str, Any] | None = None
    port: int = field(default_factory=free_port)
    side_port: int = field(default_factory=free_port)
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return FOLDER / "logs" / f"{self.name}.log"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns once it answers /health. Raises AssertionError with the end of its log."""
        command = [str(FOLDER / "venv/bin/vllm"), "serve", str(self.model), "--port", str(self.port), *ARGUMENTS]
        for flag, config in (("--ec-transfer-config", self.ec), ("--kv-transfer-config", self.kv)):
            command += [flag, json.dumps(config)] if config else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_port)},
                start_new_session=True,  # its workers can be killed with it
                preexec_fn=die_with_parent,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT), aiohttp.ClientSession() as session:
                while not await self._healthy(session):
                    assert self.alive, f"{self.name} ended with {self._process.returncode}:\n{self.last_lines()}"
                    await asyncio.sleep(1.0)
        except TimeoutError:
            raise AssertionError(
                f"{self.name} did not serve within {START_TIMEOUT:g} s:\n{self.last_lines()}"
            ) from None

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    async def kill(self) -> None:
        """At once, with all its workers."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """As a process manager would: a request first, then by force. Safe when it has ended, or never began."""
        if self.alive:
            assert self._process is not None
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await self._process.wait()
        await self.kill()

    async def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        await self._process.wait()
