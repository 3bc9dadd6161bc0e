"""Everything is restarted, one after the other, under load: two proxies behind a real nginx, and every engine behind
them. Not one request fails, and not one is asked of engines twice: this nginx repeats no request that it has sent."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import io
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import pytest

from bench.scripted.candidates import free_port
from tests.fakes.media import chat, image, part
from tests.fakes.native import Decode, Encoder, Engine, Prefill
from tests.support.command import ready
from tests.support.waiting import eventually, until

CLIENTS = 8
BODIES = (chat(), chat(stream=True), chat(part(image())), chat(part(image(16, 8)), stream=True))


@dataclass
class Member:
    """One proxy, which comes back at the same port."""

    argv: Sequence[str]
    port: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, http: aiohttp.ClientSession) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--log-level", "warning", *self.argv),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert (await self.process.stdout.readline()).startswith(b"READY")
        await ready(http, self.url)

    async def stop(self) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await self.process.communicate()
        return self.process.returncode or 0


@dataclass
class Load:
    """Clients that ask one thing after the other, each what its turn says, until they are told to stop."""

    http: aiohttp.ClientSession
    url: str
    served: int = 0
    failures: list[str] = field(default_factory=list)
    over: bool = False

    async def ask(self, client: int) -> None:
        turn = client
        while not self.over:
            turn += 1
            body = BODIES[turn % len(BODIES)]
            try:
                status, answer = await self._answer(orjson.dumps(body))
            except aiohttp.ClientError as error:
                status, answer = 0, repr(error).encode()
            whole = answer.endswith(b"data: [DONE]\n\n") if body.get("stream") else b'"choices"' in answer
            if status == 200 and whole:
                self.served += 1
            else:
                self.failures.append(f"{status} {answer[-300:]!r}")

    async def _answer(self, data: bytes) -> tuple[int, bytes]:
        typed = {"content-type": "application/json"}
        async with self.http.post(f"{self.url}/v1/chat/completions", data=io.BytesIO(data), headers=typed) as response:
            return response.status, await response.read()

    async def more(self, count: int = 4 * CLIENTS) -> None:
        """Until `count` requests more have been served, or one has failed."""
        enough = self.served + count
        await until(lambda: self.served >= enough or self.failures, 60)


@contextlib.asynccontextmanager
async def nginx(program: str, folder: Path, members: Sequence[Member]) -> AsyncIterator[str]:
    """One that keeps connections to `members`, and sends to the other what it could not send to one."""
    port = free_port()
    servers = " ".join(f"server 127.0.0.1:{member.port} max_fails=0;" for member in members)
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"""
daemon off; user {getpass.getuser()}; worker_processes 1; pid {folder}/pid;
events {{}}
http {{
    access_log off; {temporary}
    upstream triptych {{ zone triptych 64k; {servers} keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://triptych;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_connect_timeout 1s;
            proxy_next_upstream error timeout;
        }}
    }}
}}
""")
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


@dataclass
class Site:
    members: list[Member]
    engines: list[Engine]
    load: Load
    http: aiohttp.ClientSession

    async def restart_proxy(self, member: Member) -> None:
        assert await member.stop() == 0
        await self.load.more()
        await member.start(self.http)
        await self.load.more()

    async def restart_engine(self, engine: Engine) -> None:
        """As our engines do with --register: drained, gone, begun again, registered."""
        for member in self.members:
            await self._post(member, "/instances/drain", {"url": engine.url})
        for member in self.members:
            await eventually(lambda member=member: self._gone(member, engine))  # type: ignore[misc]
        assert engine.running == 0
        await engine.stop()
        await self.load.more()
        await engine.start()
        for member in self.members:
            await self._post(member, "/instances", {"url": engine.url, "role": engine.role})
        for member in self.members:
            await eventually(lambda member=member: self._ready(member, engine))  # type: ignore[misc]
        await self.load.more()

    async def _post(self, member: Member, path: str, body: dict[str, str]) -> None:
        async with self.http.post(f"{member.url}{path}", json=body) as response:
            assert response.status == 200, await response.text()

    async def _gone(self, member: Member, engine: Engine) -> bool:
        return engine.url not in await self._states(member)

    async def _ready(self, member: Member, engine: Engine) -> bool:
        return (await self._states(member)).get(engine.url) == "READY"

    async def _states(self, member: Member) -> dict[str, str]:
        async with self.http.get(f"{member.url}/instances") as response:
            return {shown["url"]: shown["state"] for shown in (await response.json())["instances"]}


@contextlib.asynccontextmanager
async def site(program: str, folder: Path, *flags: str) -> AsyncIterator[Site]:
    """Two of everything, under load within."""
    async with contextlib.AsyncExitStack() as stack:
        pools = [[await stack.enter_async_context(kind()) for _ in range(2)] for kind in (Encoder, Prefill, Decode)]
        lists = [",".join(engine.url for engine in pool) for pool in pools]
        argv = [
            f"--{role}-servers-urls={urls}" for role, urls in zip(("encode", "prefill", "decode"), lists, strict=True)
        ]
        argv += ["--kv-handoff", "push", "--metaserver-port", "0", "--probe-interval", "0.2", *flags]
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        members = [Member(argv), Member([*argv, "--workers", "2"])]
        for member in members:
            await member.start(http)
            stack.push_async_callback(member.stop)
        url = await stack.enter_async_context(nginx(program, folder, members))
        await eventually(lambda: _answers(http, url))
        load = Load(http, url)
        async with asyncio.TaskGroup() as group:
            for client in range(CLIENTS):
                group.create_task(load.ask(client))
            try:
                await load.more()
                yield Site(members, [engine for pool in pools for engine in pool], load, http)
            finally:
                load.over = True


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with http.get(f"{url}/ready") as response:
            return response.status == 200
    return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", ["0", "0.5"])
async def test_no_request_fails_while_everything_is_restarted(
    delay: str, part: Callable[[str], str], tmp_path: Path
) -> None:
    async with site(part("nginx"), tmp_path, "--drain-delay", delay) as found:
        for member in [*found.members, *found.members]:
            await found.restart_proxy(member)
        for engine in found.engines:
            await found.restart_engine(engine)
    load = found.load
    assert load.failures == [], (tmp_path / "error.log").read_text()
    answered = sum(len(engine.calls) for engine in found.engines if isinstance(engine, Decode))
    assert load.served == answered > 4 * CLIENTS * 10, "none was asked twice"
