"""A deployment on one machine: which engines, started as processes, and the proxy in front of them.

Nothing of them is imported. An engine that dies is started again on its port (a few times a minute at most), as a
process manager would do; the proxy finds it by probing.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from deploy.processes import Child, StartError

TOPOLOGY = re.compile(r"^(?:(?P<e>\d+)e)?(?:(?P<p>\d+)p(?P<d>\d+)d|(?P<pd>\d+)pd)$|^(?P<epd>\d+)epd$")
RESTART_WINDOW = 60.0


def say(text: str) -> None:
    """Progress for people goes to stderr; stdout is for the READY line."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Topology:
    """How many instances of each role; `both` are combined prefill-and-decode engines, `whole` encode as well."""

    encode: int = 0
    prefill: int = 0
    decode: int = 0
    both: int = 0
    whole: int = 0

    @classmethod
    def parse(cls, text: str) -> Topology:
        """
        >>> Topology.parse("2e1p1d")
        Topology(encode=2, prefill=1, decode=1, both=0, whole=0)

        :raises argparse.ArgumentTypeError: not of the form 1e1p1d, 1e1pd, 1p1d, 1pd or 1epd, or a stage has no
        instance.
        """
        found = TOPOLOGY.match(text.lower())
        if not found:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no topology: write 1e1p1d (three stages apart), 1e1pd (P and D in one), 1epd (all in "
                "one), 1p1d or 1pd"
            )
        counts = found.groupdict()
        if any(count is not None and not int(count) for count in counts.values()):
            raise argparse.ArgumentTypeError(f"{text!r} leaves a stage without an instance")
        return cls(*(int(counts[name] or 0) for name in ("e", "p", "d", "pd", "epd")))

    def engines(self) -> list[tuple[str, str]]:
        """(name, role) of every engine, encoders first."""
        counts = {name: getattr(self, name) for name in ("encode", "prefill", "decode", "both", "whole")}
        return [(f"{role}-{n}", role) for role, count in counts.items() for n in range(count)]


@dataclass(slots=True)
class Deployment:
    """Engines and a proxy as children of this process.

    :param engine_arguments: passed to every engine, before those of its role ("encode", "prefill", "decode", "both",
        "whole") in `role_arguments`.
    :param embedding_store: memory of an embedding store that all engines share, as `triptych store --bytes` takes it;
        empty: there is none.
    """

    model: Path
    topology: Topology
    port: int = 0
    host: str = "127.0.0.1"
    transfer: str = "shm"
    kv_handoff: str = "push"
    engine_arguments: Sequence[str] = ()
    role_arguments: dict[str, Sequence[str]] = field(default_factory=dict)
    proxy_arguments: Sequence[str] = ()
    embedding_store: str = ""
    start_timeout: float = 120.0
    restarts: int = 3  # of one engine within RESTART_WINDOW seconds
    verbose: bool = False
    engines: dict[str, Child] = field(default_factory=dict)
    proxy: Child | None = None
    store: Child | None = None
    _watchers: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def url(self) -> str:
        assert self.proxy is not None
        return self.proxy.url

    def role(self, role: str) -> list[Child]:
        return [child for name, child in self.engines.items() if name.startswith(f"{role}-")]

    async def start(self) -> None:
        """Start the embedding store if there is one, then all engines at once, then the proxy in front of them.

        :raises StartError: one did not start; all are stopped then.
        """
        try:
            if self.embedding_store:
                flags = ["--port", "0", "--bytes", self.embedding_store]
                self.store = Child("store", "engines.store", flags, self._log)
                await self._start_together([self.store])
            for name, role in self.topology.engines():
                self.engines[name] = self._engine(name, role)
            await self._start_together(list(self.engines.values()))
            self.proxy = Child("proxy", "proxy", self._proxy_arguments(), self._log)
            await self._start_together([self.proxy])
            await self._until_serving(self.proxy)
        except BaseException:
            await self.stop(grace=0)
            raise

    async def _start_together(self, children: Sequence[Child]) -> None:
        tasks = [asyncio.create_task(self._start_one(child)) for child in children]  # noqa: TID251 - gathered below
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_one(self, child: Child) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        await child.start(self.start_timeout)
        say(f"{child.name:<10} {child.url}  ready after {clock() - started:.1f} s")

    async def _until_serving(self, proxy: Child) -> None:
        """Until the proxy has found every stage that it needs; its own READY only says that it listens."""
        last = "no answer"
        try:
            async with asyncio.timeout(self.start_timeout), aiohttp.ClientSession() as session:
                while proxy.returncode is None:
                    async with session.get(f"{proxy.url}/ready") as response:
                        if response.status == 200:
                            return
                        last = await response.text()
                    await asyncio.sleep(0.1)
        except (TimeoutError, aiohttp.ClientError):
            pass
        raise StartError(f"the proxy cannot serve: {last}\n{proxy.last_lines}")

    def _engine(self, name: str, role: str) -> Child:
        common = ["--model", str(self.model), "--host", self.host, "--transfer", self.transfer, *self.engine_arguments]
        if self.store is not None:
            common += ["--embedding-store", self.store.url.removeprefix("tcp://")]
        own = list(self.role_arguments.get(role, ()))
        if "--port" not in own:
            own += ["--port", "0"]
        if role == "encode":
            return Child(name, "engines.encoder", [*common, *own], self._log)
        stages = ["--role", "both", "--encode"] if role == "whole" else ["--role", role]
        return Child(name, "engines.language", [*common, *stages, *own], self._log)

    def _proxy_arguments(self) -> list[str]:
        urls = {role: ",".join(child.url for child in self.role(role)) for role in ("encode", "prefill", "decode")}
        combined = ",".join(child.url for child in (*self.role("both"), *self.role("whole")))
        arguments = ["--host", self.host, "--port", str(self.port), "--kv-handoff", self.kv_handoff]
        if urls["encode"]:
            arguments += ["--encode-servers-urls", urls["encode"]]
        if combined:
            arguments += ["--prefill-servers-urls", "disable", "--decode-servers-urls", combined]
        else:
            arguments += ["--prefill-servers-urls", urls["prefill"], "--decode-servers-urls", urls["decode"]]
        return [*arguments, *self.proxy_arguments]

    def _log(self, name: str, line: str) -> None:
        if self.verbose:
            say(f"[{name}] {line}")

    def keep_alive(self) -> None:
        """From now on an engine that dies is started again on its port, and so is the store."""
        for child in self._behind_the_proxy():
            self._watchers.append(asyncio.create_task(self._watch(child)))  # noqa: TID251 - kept, cancelled in stop

    async def _watch(self, child: Child) -> None:
        clock = asyncio.get_running_loop().time
        deaths: list[float] = []
        while True:
            code = await child.wait()
            deaths = [moment for moment in deaths if clock() - moment < RESTART_WINDOW] + [clock()]
            if len(deaths) > self.restarts:
                say(f"{child.name} ended {len(deaths)} times in {RESTART_WINDOW:.0f} s; left down:\n{child.last_lines}")
                return
            say(f"{child.name} ended with {code}; starting it again")
            child.keep_port()
            try:
                await self._start_one(child)
            except StartError as error:
                say(str(error))  # one more death

    async def stop(self, grace: float = 10.0) -> None:
        """Stop the proxy first, then the others; waits until all are gone."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        if self.proxy is not None:
            await self.proxy.stop(grace)
        await asyncio.gather(*(child.stop(grace) for child in self._behind_the_proxy()))

    def _behind_the_proxy(self) -> list[Child]:
        return [*self.engines.values(), *([] if self.store is None else [self.store])]

    async def __aenter__(self) -> Deployment:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()
