"""Our engines, on no list: they register at two proxies, and are started again one by one under load."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from deploy.processes import Child
from tests.fakes.media import chat, image, part
from tests.support.checkpoints import checkpoint
from tests.support.waiting import eventually

KEY = "engines"
CLIENTS = 3
PROXY = (
    "--host",
    "127.0.0.1",
    "--port",
    "0",
    "--register-key",
    KEY,
    "--probe-interval",
    "0.2",
    "--log-level",
    "warning",
)


@asynccontextmanager
async def started(name: str, module: str, *flags: str) -> AsyncIterator[Child]:
    child = Child(name, module, flags)
    try:
        await child.start()
        child.keep_port()
        yield child
    finally:
        await child.stop()


class Load:
    """Clients that ask both proxies by turns, with an image of its own in every request."""

    def __init__(self, http: aiohttp.ClientSession, proxies: list[str]) -> None:
        self._http = http
        self._proxies = itertools.cycle(proxies)
        self._colors = itertools.product(range(256), repeat=3)
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []

    async def run(self) -> None:
        while True:
            body = chat(part(image(56, 56, color=next(self._colors))), max_tokens=4, temperature=0)
            async with self._http.post(next(self._proxies) + "/v1/chat/completions", json=body) as response:
                self.statuses[response.status] += 1
                if response.status != 200:
                    self.failures.append(await response.text())
                await response.read()


@pytest.mark.timeout(400)
async def test_engines_that_register_themselves_are_started_again_and_no_request_fails() -> None:
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(started(f"proxy-{n}", "proxy", *PROXY)) for n in range(2)]
        urls = [proxy.url for proxy in proxies]
        common = (
            "--model",
            str(checkpoint("qwen2_vl")),
            "--served-model-name",
            "tiny",
            "--port",
            "0",
            "--threads",
            "1",
        )
        known = ("--register", ",".join(urls), "--register-key", KEY, "--register-ttl", "3", "--grace", "30")
        engines = [
            await stack.enter_async_context(started(f"{kind}-{n}", f"engines.{kind}", *common, *known))
            for kind in ("encoder", "language")
            for n in range(2)
        ]
        http = await stack.enter_async_context(aiohttp.ClientSession())

        async def all_ready() -> bool:
            return [await states(http, url) for url in urls] == [["READY"] * len(engines)] * len(urls)

        await eventually(all_ready, 60)
        load = Load(http, urls)
        clients = [asyncio.create_task(load.run()) for _ in range(CLIENTS)]
        for engine in engines:
            served = load.statuses[200]
            engine.signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await engine.wait() == 0
            assert [engine.url in await listed(http, url) for url in urls] == [False, False], "gone, not only down"
            await engine.start()
            await eventually(all_ready, 60)
            assert load.statuses[200] > served, "the others have served meanwhile"
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        assert load.statuses.keys() == {200}, load.failures[:3]


async def listed(http: aiohttp.ClientSession, proxy: str) -> dict[str, str]:
    """State by URL."""
    async with http.get(f"{proxy}/instances") as response:
        return {one["url"]: one["state"] for one in (await response.json())["instances"]}


async def states(http: aiohttp.ClientSession, proxy: str) -> list[str]:
    return [*(await listed(http, proxy)).values()]
