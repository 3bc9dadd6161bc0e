"""Who is listed of the scripted engines, said to a proxy in both ways there are: encoders and prefill engines by
service records of a name server, decode engines by heartbeats in their name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp

from bench.scripted.names import Names, naming

KEY = "chaos"
_NAMED = ("encode", "prefill")
_INTERVAL_S = 0.1  # between two looks at a name
_TTL_S = 1.0
_BEAT_S = 0.3


class Directory:
    """Engines by their role's label; all are listed at first."""

    def __init__(self, names: Names, proxy: str, engines: Mapping[str, tuple[str, ...]]) -> None:
        self._names = names
        self._proxy = proxy
        self.urls = engines
        self._roles = {url: role for role, urls in engines.items() for url in urls}
        self._listed = dict.fromkeys(self._roles)
        self._write()

    def __repr__(self) -> str:
        return f"<Directory of {len(self._listed)} of {len(self._roles)} engines>"

    def flags(self) -> tuple[str, ...]:
        """What a proxy is started with to know them."""
        found = ("--register-key", KEY, "--dns-server", self._names.address, "--discovery-interval", str(_INTERVAL_S))
        return (*found, *(flag for role in _NAMED for flag in (f"--{role}-servers-urls", f"srv+http://{_name(role)}")))

    def drop(self, url: str) -> None:
        """It is listed no more; its process knows nothing of that."""
        self._listed.pop(url, None)
        self._write()

    def add(self, url: str) -> None:
        self._listed[url] = None
        self._write()

    def fail(self, failing: bool) -> None:
        """The name server answers that it cannot, or can again."""
        self._names.failing = failing

    async def settled(self, seconds: float) -> None:
        """Wait until every engine is READY behind the proxy, for so long at the most: some may have been killed."""
        async with aiohttp.ClientSession() as http:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while await self._states(http) != ["READY"] * len(self._roles):  # noqa: ASYNC110 - it must be asked
                        await asyncio.sleep(0.05)

    async def _states(self, http: aiohttp.ClientSession) -> list[str]:
        async with http.get(f"{self._proxy}/instances") as response:
            return [instance["state"] for instance in (await response.json())["instances"]]

    def _write(self) -> None:
        for role in _NAMED:
            ports = [url.rpartition(":")[2] for url in self._listed if self._roles[url] == role]
            self._names.records[_name(role), "SRV"] = [f"0 0 {port} 127.0.0.1." for port in ports]

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Within, heartbeats are sent for the listed ones that no name stands for."""
        async with aiohttp.ClientSession(headers={"x-api-key": KEY}) as http, asyncio.TaskGroup() as group:
            beating = group.create_task(self._beat(http))
            try:
                yield
            finally:
                beating.cancel()

    async def _beat(self, http: aiohttp.ClientSession) -> None:
        while True:
            for url in [url for url in self._listed if self._roles[url] not in _NAMED]:
                body = {"role": self._roles[url], "url": url, "ttl": _TTL_S}
                with suppress(aiohttp.ClientError):  # a proxy that does not listen yet
                    async with http.post(f"{self._proxy}/instances", json=body) as response:
                        await response.read()
            await asyncio.sleep(_BEAT_S)


@asynccontextmanager
async def directory(proxy: str, engines: Mapping[str, tuple[str, ...]]) -> AsyncIterator[Directory]:
    """Of these engines by role, for the proxy at that URL, whether it listens yet or not."""
    async with naming() as names:
        found = Directory(names, proxy, engines)
        async with found.beating():
            yield found


def _name(role: str) -> str:
    return f"_{role}._tcp.chaos.test"
