"""Names that come, change, fail and go, and heartbeats that stop, over a real name server and real probes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.scripted.names import Names, naming
from proxy.balancer.fleet import Fleet
from proxy.core import BOTH, State
from proxy.discovery.base import Say
from proxy.discovery.watching import Discovery
from proxy.joining import heartbeats
from proxy.joining.membership import Membership
from proxy.settings import Endpoint
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat
from tests.fakes.native import Language
from tests.support.crowd import crowd
from tests.support.waiting import eventually, until


@asynccontextmanager
async def named() -> AsyncIterator[tuple[Names, Language]]:
    """A name server, and an engine that it does not know yet as _e._tcp.test."""
    async with naming() as names, Language() as engine:
        yield names, engine


def services(*engines: Language) -> list[str]:
    return [f"0 0 {engine.url.rpartition(':')[2]} 127.0.0.1." for engine in engines]


def discovered(names: Names, engine: Language, **settings: Any) -> Any:
    """A proxy with one combined engine on its list beside the name."""
    flags = {"dns_server": names.address, "discovery_interval": 0.02, "probe_interval": 0.05}
    return deployment("1b", **flags, **settings)


def state(d: Deployment, engine: Language) -> State | None:
    instance = d.proxy.fleet.get(engine.url)
    return None if instance is None else instance.state


async def test_who_comes_serves_and_who_goes_finishes_first() -> None:
    async with named() as (names, engine), discovered(names, engine) as d:
        listed = [*d.proxy.settings.fleet(), (BOTH, Endpoint.parse("srv+http://_e._tcp.test", "auto"))]
        d.proxy.membership.configure(listed)
        names.records["_e._tcp.test", "SRV"] = services(engine)
        await until(lambda: state(d, engine) is State.READY)
        gates = engine.gate = d.combined[0].gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await engine.until(lambda: engine.running == 1)
        del names.records["_e._tcp.test", "SRV"]
        await until(lambda: state(d, engine) is State.DRAINING)
        gates.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]
        await until(lambda: state(d, engine) is None)
        assert engine.aborted == 0


async def test_a_name_server_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with named() as (names, engine), discovered(names, engine) as d:
        d.proxy.membership.configure([(BOTH, Endpoint.parse("srv+http://_e._tcp.test", "auto"))])
        names.records["_e._tcp.test", "SRV"] = services(engine)
        await until(lambda: state(d, engine) is State.READY)
        names.failing = True
        await until(lambda: "counts as it was" in caplog.text)
        assert state(d, engine) is State.READY
        names.failing, names.records = False, {}
        await until(lambda: state(d, engine) is None, 20)


async def test_heartbeats_that_stop_drain_their_engine() -> None:
    async with named() as (names, engine), discovered(names, engine) as d:
        beat = {"role": "both", "url": engine.url, "ttl": 0.6}
        await d.post(beat, "/instances")
        await until(lambda: state(d, engine) is State.READY)
        await until(lambda: state(d, engine) is None)


class Twice:
    """A finder that says one engine, and ends; then says another."""

    def __init__(self) -> None:
        self.calls = 0

    async def watch(self, endpoint: Endpoint, say: Say) -> None:
        self.calls += 1
        say([f"10.0.0.{self.calls}:80"])
        if self.calls > 1:
            await asyncio.Event().wait()


async def test_a_watch_that_ends_begins_again_and_one_of_no_list_ends() -> None:
    fleet, finder = Fleet(), Twice()
    membership = Membership(fleet, heartbeats.alone())
    discovery = Discovery(membership, lambda word: finder, lambda: None)
    membership.configure([(BOTH, Endpoint.parse("dns+http://e.test:80", "auto"))])
    running = asyncio.create_task(discovery.run())
    await until(lambda: finder.calls == 2)
    assert {instance.url: instance.state for instance in fleet} == {
        "http://10.0.0.1:80": "DRAINING",
        "http://10.0.0.2:80": "JOINING",
    }
    assert repr(discovery) == "<Discovery of 1 names, not readable: {}>"
    membership.configure([(BOTH, Endpoint.parse("dns+http://e.test:80?weight=2", "auto"))])
    await until(lambda: finder.calls == 3)
    membership.configure([])
    assert {instance.state for instance in fleet} == {State.DRAINING}
    running.cancel()
    await asyncio.wait([running])


async def test_who_could_not_be_heard_is_not_late() -> None:
    now, looks = 100.0, 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return now

    beats, fleet = heartbeats.alone(), Fleet()
    membership = Membership(fleet, beats)
    membership.register(BOTH, Endpoint.parse("http://e:1", "auto"), "", 105.0)
    running = asyncio.create_task(Discovery(membership, lambda word: Twice(), lambda: None, clock).run())
    await until(lambda: looks)
    now = 160.0  # the process was stopped
    await until(lambda: beats.until("http://e:1") == 165.0)
    assert [instance.state for instance in fleet] == [State.JOINING]
    running.cancel()
    await asyncio.wait([running])


async def test_the_next_worker_goes_on_where_the_one_that_watched_was_killed(tmp_path: Path) -> None:
    async with named() as (names, engine), Language() as other:
        names.records["_e._tcp.test", "SRV"] = services(engine, other)
        flags = ["--decode-servers-urls", "srv+http://_e._tcp.test", "--dns-server", names.address]
        async with crowd(tmp_path, 2, *flags, "--discovery-interval", "0.05") as proxy:

            async def known() -> dict[str, str]:
                try:
                    return {url: shown["state"] for url, shown in (await proxy.instances()).items()}
                except aiohttp.ClientError:
                    return {}  # no worker listens at this moment

            async def both() -> bool:
                return await known() == {engine.url: "READY", other.url: "READY"}

            await eventually(both)
            asked = names.asked["_e._tcp.test"]
            await until(lambda: names.asked["_e._tcp.test"] > asked)
            for victim in proxy.workers():
                os.kill(victim, signal.SIGKILL)
                await until(lambda victim=victim: len(proxy.workers()) == 2 and victim not in proxy.workers())  # type: ignore[misc]
            names.records["_e._tcp.test", "SRV"] = services(other)

            async def one() -> bool:
                return await known() == {other.url: "READY"}

            await eventually(one)
            assert await proxy.chat(chat()) == 200
