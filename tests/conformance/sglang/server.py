"""A real SGLang server as a child process, on a free port, with its log in a file. It knows no proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from deploy.processes import die_with_parent
from tests.conformance.vllm.engine import free_port

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / ".conformance" / "sglang"
VERSIONS = ("0.5.10", "0.5.23")
START_TIMEOUT = 600.0
LAST_LINES = 15
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
}
ENCODER = ("--encoder-only",)
LANGUAGE = (
    *("--language-only", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--disable-radix-cache", "--disable-cuda-graph"),
    *("--max-total-tokens", "4096", "--skip-server-warmup"),
)


@dataclass
class Sglang:
    """One server. `arguments`: ENCODER, or LANGUAGE with its `--encoder-urls`."""

    version: str
    name: str
    model: Path
    arguments: tuple[str, ...]
    port: int = field(default_factory=free_port)
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return FOLDER / "logs" / f"{self.version}-{self.name}.log"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns once it answers /health; after a `kill`, on the same port again. Raises AssertionError."""
        python = str(FOLDER / self.version / "bin" / "python")
        options = ["--model-path", str(self.model), "--served-model-name", "tiny", "--host", "127.0.0.1"]
        options += ["--device", "cpu", "--port", str(self.port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(python, "-m", "sglang.launch_server", *options, *self.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # its schedulers can be killed with it
                preexec_fn=die_with_parent,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while not await self.healthy():
                    assert self.alive, f"{self.name} ended:\n{self.last_lines()}"
                    await asyncio.sleep(1.0)
        except TimeoutError:
            raise AssertionError(f"{self.name} does not serve:\n{self.last_lines()}") from None

    async def healthy(self) -> bool:
        limit = aiohttp.ClientTimeout(total=20)
        try:
            async with aiohttp.ClientSession(timeout=limit) as http, http.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    async def kill(self) -> None:
        """With -9, and everything that it has started."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """To it and everything that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
