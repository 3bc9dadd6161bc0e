"""Proxies to be compared: Triptych's, nginx with one hop, and the routers of vLLM and SGLang, each as its users run it.

Peers are measured when they are installed: nginx from Debian, the routers from PyPI (`vllm-router`, `sglang-router`),
on PATH or in the `bin` folder of an environment. Nothing is installed here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.scripted import answers, usage
from bench.scripted.client import Client
from bench.scripted.verdict import Verdict, judge
from deploy.processes import die_with_parent

PEERS = {"nginx": "nginx", "vllm-router": "vllm-router", "sglang-router": "sglang-router"}
HANDOFFS = ("push", "pull")
BARE = "bare"  # bench.scripted.bare
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0

# What a user sets to stream through nginx: no buffering either way, and connections to engines that stay open.
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 0; keepalive_requests 1000000; keepalive_timeout 600;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engines {{ {servers} keepalive 256; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout {timeout};
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The URLs of scripted engines."""

    encode: tuple[str, ...]
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """What is the same for all: where peers are, and how patient a proxy is with an engine, in seconds."""

    peers_bin: Path | None = None
    timeout: float = 300.0
    arguments: tuple[str, ...] = ()  # more flags for our own proxy


class NotStarted(Exception):
    """A candidate ended, or served nothing, in its time to start. The message has its last output."""


class Candidate:
    """A running proxy: its name, its URL, its first process."""

    def __init__(self, name: str, url: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.url = url
        self._process = process
        self._log = log

    def __repr__(self) -> str:
        return f"<Candidate {self.name} {self.url} pid {self._process.pid}>"

    @property
    def pids(self) -> list[int]:
        return usage.tree(self._process.pid)

    @property
    def output(self) -> str:
        """The last lines of what it printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    async def ready(self) -> None:
        """Wait until it serves a request. Raises NotStarted."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not await self._serves():
                    if self._process.returncode is not None:
                        raise NotStarted(f"{self.name} ended with {self._process.returncode}:\n{self.output}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise NotStarted(f"{self.name} served nothing in {_START_TIMEOUT_S:.0f} s:\n{self.output}") from None

    async def _serves(self) -> bool:
        client = Client(self.url)
        answer = await client.post(answers.CHAT, answers.request("hello", 1, stream=False), timeout=5)
        client.close()
        return judge(answer, answers.text("hello", 1), stream=False) is Verdict.SERVED

    async def stop(self) -> None:
        """End it and all its descendants."""
        for number, patience in ((signal.SIGTERM, _STOP_TIMEOUT_S), (signal.SIGKILL, _STOP_TIMEOUT_S)):
            if self._process.returncode is None:
                self._process.send_signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._process.wait()
        with suppress(ProcessLookupError):  # a first process that was killed has not ended the others
            os.killpg(self._process.pid, signal.SIGKILL)


@asynccontextmanager
async def running(name: str, fleet: Fleet, options: Options) -> AsyncIterator[Candidate]:
    """`name` (triptych-push, triptych-pull, bare, or a peer) in front of `fleet`, serving. Raises NotStarted."""
    with TemporaryDirectory(prefix="bench-") as folder:
        port = free_port()
        command = command_of(name, fleet, options, port, Path(folder))
        async with launched(name, command, port, Path(folder)) as candidate:
            yield candidate


@asynccontextmanager
async def launched(name: str, command: Sequence[str], port: int, folder: Path) -> AsyncIterator[Candidate]:
    """`command`, which is to serve on `port`, with its output in `folder`. Raises NotStarted."""
    log = folder / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
    candidate = Candidate(name, f"http://127.0.0.1:{port}", process, log)
    try:
        await candidate.ready()
        yield candidate
    finally:
        await candidate.stop()


def found(name: str, options: Options) -> str | None:
    """The program of a peer, or None if it is not installed."""
    folder = None if options.peers_bin is None else str(options.peers_bin)
    return (folder and shutil.which(PEERS[name], path=folder)) or shutil.which(PEERS[name]) or _debian(name)


def _debian(name: str) -> str | None:
    return shutil.which(PEERS[name], path="/usr/sbin")


def command_of(name: str, fleet: Fleet, options: Options, port: int, folder: Path) -> list[str]:
    """How to start a candidate on `port`."""
    if name.startswith("triptych-"):
        return _triptych(fleet, options, port, name.removeprefix("triptych-"))
    if name == BARE:
        engines = ["--prefill", fleet.prefill[0], "--decode", fleet.decode[0]]
        return [sys.executable, "-m", "bench.scripted.bare", *engines, "--port", str(port)]
    program = found(name, options)
    if program is None:
        raise NotStarted(f"{name} is not installed")
    if name == "nginx":
        servers = " ".join(f"server {url.removeprefix('http://')};" for url in fleet.decode)
        text = NGINX.format(folder=folder, port=port, servers=servers, timeout=f"{options.timeout:.0f}s")
        (folder / "nginx.conf").write_text(text)
        return [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    return [program, *_router(name, fleet, port, options)]


def _triptych(fleet: Fleet, options: Options, port: int, handoff: str) -> list[str]:
    lists = {"encode": fleet.encode, "prefill": fleet.prefill, "decode": fleet.decode}
    flags = [flag for role, urls in lists.items() if urls for flag in (f"--{role}-servers-urls", ",".join(urls))]
    where = ["--host", "127.0.0.1", "--port", str(port), "--kv-handoff", handoff]
    return [sys.executable, "-m", "proxy", *flags, *where, *options.arguments]


def _router(name: str, fleet: Fleet, port: int, options: Options) -> list[str]:
    sglang = name == "sglang-router"
    mode = ["launch", "--pd-disaggregation"] if sglang else ["--vllm-pd-disaggregation"]
    prefills = [part for url in fleet.prefill for part in ("--prefill", url, *(["8998"] if sglang else []))]
    decodes = [part for url in fleet.decode for part in ("--decode", url)]
    return [
        *(*mode, *prefills, *decodes, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-startup-check-interval", "1", "--worker-startup-timeout-secs", "30"),
        *("--prometheus-port", str(free_port()), "--request-timeout-secs", f"{options.timeout:.0f}"),
    ]


def free_port() -> int:
    """A port that nobody has now: for programs that cannot choose one and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def known(names: Sequence[str]) -> list[str]:
    """`names`, if every one is a peer. Raises ValueError."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"no peer {unknown[0]!r} (known: {', '.join(PEERS)})")
    return list(names)
