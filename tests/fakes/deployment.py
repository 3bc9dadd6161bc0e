"""A proxy in this process before scripted engines, over real sockets. Leaving it checks that nothing leaked."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.app import Proxy
from proxy.core import State
from proxy.joining.membership import CONFIGURED
from proxy.settings import ProxySettings
from tests.fakes import native
from tests.fakes.native import Decode, Encoder, Engine, Language, Prefill

FAST: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "probe_interval": 30.0, "grace_timeout": 1.0}


@dataclass
class Deployment:
    proxy: Proxy
    http: aiohttp.ClientSession
    encoders: list[Encoder] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    combined: list[Language] = field(default_factory=list)

    @property
    def engines(self) -> list[Engine]:
        return [*self.encoders, *self.prefills, *self.decodes, *self.combined]

    @property
    def url(self) -> str:
        return self.proxy.url

    async def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Answer:
        data = io.BytesIO(body if isinstance(body, bytes) else orjson.dumps(body))
        named = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        async with self.http.post(self.url + path, headers=named, data=data) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str) -> Answer:
        async with self.http.get(self.url + path) as response:
            return Answer(response.status, response.headers, await response.read())

    async def settle(self) -> None:
        """Every lease back, nobody waiting, no engine in a call."""
        async with asyncio.timeout(10):
            while self.busy():
                await asyncio.sleep(0.005)
        self.proxy.balancer.ledger.check()

    def down(self) -> set[str]:
        """Who is DOWN, by host and port."""
        return {instance.netloc for instance in self.proxy.fleet if instance.state is State.DOWN}

    def states(self) -> list[str]:
        """Each instance's state and why, in words."""
        return [f"{instance.netloc} {instance.state}: {instance.reason}" for instance in self.proxy.fleet]

    def busy(self) -> list[str]:
        """What is not back to nothing, in words."""
        ledger = self.proxy.balancer.ledger
        found = [f"{engine.role} is in {engine.running} calls" for engine in self.engines if engine.running]
        if ledger.leases():
            found.append(repr(ledger))
        if len(self.proxy.metaserver):
            found.append("a request waits for its callback")
        return found


@dataclass(frozen=True)
class Answer:
    status: int
    headers: CIMultiDictProxy[str] | CIMultiDict[str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def route(self) -> str:
        return self.headers["x-triptych-route"]


@asynccontextmanager
async def deployment(
    topology: str = "1e1p1d",
    handoff: str = "push",
    make: Mapping[str, Callable[[], Any]] = native.ENGINES,
    **settings: Any,
) -> AsyncIterator[Deployment]:
    """`topology` counts engines by letter: 2e1p1d, 1e1b (b: combined), 1b. All are READY on entry."""
    counts = {letter: int(number) for number, letter in zip(topology[::2], topology[1::2], strict=True)}
    encoders, prefills, decodes, combined = ([make[kind]() for _ in range(counts.get(kind, 0))] for kind in "epdb")
    async with native.started([*encoders, *prefills, *decodes, *combined]):
        configured = ProxySettings(
            encode_servers_urls=_urls(encoders),
            prefill_servers_urls=_urls(prefills),
            decode_servers_urls=_urls([*decodes, *combined]),
            kv_handoff=handoff,  # type: ignore[arg-type]
            **(FAST | settings),
        )
        proxy = Proxy(configured)
        async with proxy.serving(), aiohttp.ClientSession() as http:
            found = Deployment(proxy, http, encoders, prefills, decodes, combined)
            await proxy.health.tick()
            ours = [instance for instance in proxy.fleet if CONFIGURED in instance.sources]
            assert all(instance.state is State.READY for instance in ours), found.states()
            yield found
            await found.settle()


def _urls(engines: list[Any]) -> str:
    return ",".join(engine.url for engine in engines)
