"""An engine that makes itself known, before a real proxy in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from engines.register import registered
from engines.serve import running
from engines.settings import EngineSettings
from proxy.core import Role, State
from tests.engines.test_serve import Toy, settings
from tests.fakes.deployment import Deployment, deployment
from tests.support.waiting import until


class Engine(Toy):
    """An encoder that a proxy takes for ours, and that answers what it is asked."""

    stage = role = "encode"

    def __init__(self) -> None:
        super().__init__()
        self.finish.set()

    def routes(self) -> Any:
        yield web.post("/v1/chat/completions", self.wait)


@asynccontextmanager
async def proxies(count: int, **changes: Any) -> AsyncIterator[list[Deployment]]:
    """Without engines of their own, but for one that the command asks for."""
    if not count:
        yield []
        return
    async with deployment("1b", probe_interval=0.05, **changes) as d, proxies(count - 1, **changes) as more:
        yield [d, *more]


def encode() -> str:
    return "encode"


def state(d: Deployment, url: str) -> State | None:
    instance = d.proxy.fleet.get(url)
    return None if instance is None else instance.state


def said(*at: Deployment, **changes: Any) -> EngineSettings:
    return settings(proxies=tuple(d.url for d in at), register_ttl=0.6, grace=10, **changes)


async def test_every_proxy_knows_an_engine_while_it_serves() -> None:
    async with proxies(2) as (one, other):
        ours = said(one, other)
        async with running(Engine(), ours) as url, registered(ours, encode, url):
            await until(lambda: state(one, url) is State.READY and state(other, url) is State.READY)
            instance = one.proxy.fleet.get(url)
            assert instance is not None and instance.role is Role.ENCODE
            await asyncio.sleep(0.8)  # longer than it lives without heartbeats
            assert state(one, url) is State.READY
        assert state(one, url) is state(other, url) is None
        assert one.proxy.fleet.held == {url: {"registered"}}
        port = int(url.rpartition(":")[2])
        async with running(Engine(), said(one).model_copy(update={"port": port})) as again:
            assert again == url
            async with registered(said(one), encode, url):
                await until(lambda: state(one, url) is State.READY)


async def test_leaving_waits_for_what_proxies_have_under_way() -> None:
    async with proxies(1) as (d,):
        ours = said(d)
        async with running(Engine(), ours) as url:
            leaving = registered(ours, encode, url)
            await leaving.__aenter__()
            await until(lambda: state(d, url) is State.READY)
            instance = d.proxy.fleet.get(url)
            assert instance is not None
            lease = d.proxy.balancer.ledger.lease(instance, Role.ENCODE, 10)
            left = asyncio.create_task(leaving.__aexit__(None, None, None))  # type: ignore[arg-type]
            await until(lambda: state(d, url) is State.DRAINING)
            await asyncio.sleep(0.8)  # it is not forgotten for want of heartbeats
            assert state(d, url) is State.DRAINING and not left.done()
            lease.close()
            async with asyncio.timeout(10):
                await left
        assert state(d, url) is None


async def test_leaving_does_not_wait_beyond_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    async with proxies(1) as (d,):
        ours = settings(proxies=(d.url,), grace=0.1)
        async with running(Engine(), ours) as url:
            async with registered(ours, encode, url):
                await until(lambda: state(d, url) is State.READY)
                instance = d.proxy.fleet.get(url)
                assert instance is not None
                lease = d.proxy.balancer.ledger.lease(instance, Role.ENCODE, 10)
            lease.close()
    assert "not every proxy has forgotten this engine within --grace 0.1 s" in caplog.text


async def test_a_proxy_that_starts_late_or_again_learns_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with proxies(1) as (d,):
        port = d.proxy.port
    ours = settings(proxies=(f"http://127.0.0.1:{port}",), register_ttl=0.3, grace=1)
    async with running(Engine(), ours) as url, registered(ours, encode, url):
        await until(lambda: "does not know this engine" in caplog.text)
        async with deployment("1b", probe_interval=0.05, port=port) as d:
            await until(lambda: state(d, url) is State.READY)
            await until(lambda: "knows this engine" in caplog.text)
    assert "was not told that this engine leaves" in caplog.text
    assert len([r for r in caplog.records if "does not know" in r.message]) <= 2, "once for each time, or for each way"


async def test_the_right_key_is_asked_for_and_its_own_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with proxies(1, admin_key="s3cret", register_key="engines") as (d,):
        wrong, right = said(d, register_key="wrong"), said(d, register_key="engines", key="k1")
        async with running(Engine(), right) as url:
            async with registered(wrong, encode, url):
                await until(lambda: "answers 401" in caplog.text)
            assert state(d, url) is None
            async with registered(right, encode, url):
                await until(lambda: state(d, url) is State.READY)
                instance = d.proxy.fleet.get(url)
                assert instance is not None and instance.secret == "k1"


async def test_an_admins_drain_lasts_as_long_as_the_process(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with proxies(1) as (d,):
        ours = said(d)
        async with running(Engine(), ours) as url, registered(ours, encode, url):
            await until(lambda: state(d, url) is State.READY)
            await d.post({"url": url}, "/instances/drain")
            await until(lambda: "was told to do without this engine" in caplog.text)
            assert state(d, url) is None


async def test_it_is_reached_where_it_says() -> None:
    async with proxies(1) as (d,):
        everywhere = said(d, host="0.0.0.0")
        async with running(Engine(), everywhere) as url, registered(everywhere, encode, url):
            await until(lambda: state(d, url) is State.READY)  # packets to the proxy leave from 127.0.0.1
        advertised = said(d, advertise="native+http://h.test:1/?weight=2&rack=r1")
        async with registered(advertised, encode, "http://127.0.0.1:9"):
            await until(lambda: d.proxy.fleet.get("http://h.test:1"))
            instance = d.proxy.fleet.get("http://h.test:1")
            assert instance is not None
            assert (instance.weight, instance.facts) == (2.0, {"labels": {"rack": "r1"}})
        assert state(d, "http://h.test:1") is None


async def test_what_is_no_json_is_no_proxy(caplog: pytest.LogCaptureFixture) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>welcome</html>")

    class Page(Toy):
        def routes(self) -> Any:
            yield web.post("/instances", page)
            yield web.post("/instances/drain", page)

    async with running(Page(), settings()) as stranger:
        ours = settings(proxies=(stranger,), register_ttl=0.1)
        async with registered(ours, lambda: "both", "http://e:1"):
            await until(lambda: "does not know this engine" in caplog.text)


class Turning(Toy):
    """A language engine of ours whose role is set from outside."""

    role = "prefill"

    def info(self) -> Any:
        return {"started_as": "prefill"}


async def test_an_engine_that_has_turned_is_taken_at_its_word() -> None:
    async with proxies(1) as (d,):
        d.proxy.health.probing = replace(d.proxy.health.probing, interval=600.0)  # heartbeats alone tell of it
        engine, ours = Turning(), settings(proxies=(d.url,), register_ttl=600)
        async with running(engine, ours) as url, registered(ours, lambda: engine.role, url):
            await until(lambda: state(d, url) is State.READY)
            instance = d.proxy.fleet.get(url)
            assert instance is not None and instance.role is Role.PREFILL
            engine.role = "decode"
            await until(lambda: instance.role is Role.DECODE and instance.state is State.READY)
            assert instance.listed is Role.PREFILL


async def test_proxies_hear_of_another_role_at_once() -> None:
    heard: list[str] = []

    class Ear(Toy):
        def routes(self) -> Any:
            yield web.post("/instances", self.hear)
            yield web.post("/instances/drain", self.hear)

        async def hear(self, request: web.Request) -> web.Response:
            heard.append(str((await request.json()).get("role")))
            return web.json_response({"registered": True})

    roles = ["prefill"]
    async with (
        running(Ear(), settings()) as url,
        registered(settings(proxies=(url,), register_ttl=600), lambda: roles[-1], "http://e:1"),
    ):
        await until(lambda: heard == ["prefill"])
        roles.append("decode")
        await until(lambda: heard == ["prefill", "decode"])
