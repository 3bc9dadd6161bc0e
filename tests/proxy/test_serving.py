"""The ports of a proxy, and how it ends: who is still served, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from proxy.app import Proxy
from proxy.settings import ProxySettings
from tests.fakes.deployment import FAST, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat
from tests.fakes.native import Decode, Engine, Language, Prefill
from tests.support.waiting import eventually, until


@asynccontextmanager
async def until_stopped(engines: list[Engine], **settings: Any) -> AsyncIterator[tuple[Deployment, asyncio.Event]]:
    """A deployment whose proxy leaves when the event is set; leaving this waits for that."""
    lists = {f"{'prefill' if e.role == 'prefill' else 'decode'}_servers_urls": e.url for e in engines}
    proxy = Proxy(ProxySettings(**lists, **(FAST | settings)))
    started, stop = asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with proxy.serving():
            started.set()
            await stop.wait()

    async with aiohttp.ClientSession() as http, asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(serve())
        await started.wait()
        await proxy.health.tick()
        yield Deployment(proxy, http), stop
        stop.set()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_outlives_the_grace_time_is_told_why(stream: bool) -> None:
    async with Language() as engine, until_stopped([engine], grace_timeout=0.1) as (d, stop):
        engine.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(stream=stream)))
        await engine.until(lambda: engine.running == 1)
        stop.set()
        answer = await asking
        assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "shutting_down", True)
        assert answer.headers["connection"] == "close" and "retry-after" in answer.headers
        await engine.until(lambda: engine.aborted == 1)
        assert d.proxy.balancer.ledger.leases() == 0


async def test_a_stream_that_outlives_the_grace_time_ends_with_an_error_and_no_done() -> None:
    async with Language() as engine, until_stopped([engine], grace_timeout=0.1) as (d, stop):
        engine.fail(Fault(Kind.STALL, after=1))
        async with d.http.post(f"{d.url}/v1/chat/completions", json=chat(stream=True)) as response:
            assert response.status == 200
            await response.content.readuntil(b"\n\n")
            stop.set()
            *_, last = filter(None, (await response.content.read()).split(b"\n\n"))
        assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        await engine.until(lambda: engine.aborted == 1)


async def test_a_body_that_outlives_the_grace_time_is_answered() -> None:
    async with Language() as engine, until_stopped([engine], grace_timeout=0.1) as (d, stop):
        reader, writer = await asyncio.open_connection("127.0.0.1", d.proxy.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        await until(lambda: d.proxy.metrics.in_flight._value.get() == 1)
        stop.set()
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 503 ") and b"shutting_down" in said
        writer.close()


async def test_while_it_drains_it_serves_and_says_that_it_is_not_ready() -> None:
    async with Language() as engine, until_stopped([engine], drain_delay=0.5) as (d, stop):
        assert (await d.get("/ready")).json["stopping"] is False
        stop.set()
        await until(lambda: d.proxy.openai.leaving)
        ready, answer = await d.get("/ready"), await d.post(chat())
        assert (ready.status, ready.json["ready"], ready.json["stopping"]) == (503, False, True)
        assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_decode_engines_call_back_at_a_port_of_their_own_to_the_end() -> None:
    async with Prefill() as prefill, Decode() as decode:
        gate = decode.gate = asyncio.Event()
        async with until_stopped([prefill, decode], metaserver_port=0, grace_timeout=10.0) as (d, stop):
            assert d.proxy.metaserver.port not in (0, d.proxy.port)
            asking = asyncio.create_task(d.post(chat()))
            await decode.until(lambda: decode.running == 1)
            stop.set()

            async def closed() -> bool:
                try:
                    await d.get("/health")
                except aiohttp.ClientError:
                    return True
                return False

            await eventually(closed)
            gate.set()
            assert (await asking).status == 200
            assert decode.callbacks == [(200, {"status": "ok"})]


async def test_a_stopping_proxy_still_takes_the_callbacks_of_its_requests() -> None:
    async with Prefill() as prefill, Decode() as decode, aiohttp.ClientSession() as http:
        gate = decode.gate = asyncio.Event()
        urls = {"prefill_servers_urls": prefill.url, "decode_servers_urls": decode.url}
        proxy = Proxy(ProxySettings(**urls, **(FAST | {"grace_timeout": 10.0})))
        started, stop = asyncio.Event(), asyncio.Event()

        async def serve() -> None:
            async with proxy.serving():
                started.set()
                await stop.wait()

        serving = asyncio.create_task(serve())
        await started.wait()
        await proxy.health.tick()
        asking = asyncio.create_task(http.post(f"{proxy.url}/v1/chat/completions", json=chat()))
        await decode.until(lambda: decode.running == 1)
        stop.set()
        async with asyncio.timeout(10):
            async with http.post(f"{proxy.url}/v1/chat/completions", json=chat()) as response:
                assert response.status == 503, "nobody new"
            gate.set()
            async with await asking as response:
                assert response.status == 200
            assert decode.callbacks == [(200, {"status": "ok"})]
            await serving


async def test_admins_may_have_a_port_of_their_own() -> None:
    async with deployment("1b", admin_port=0) as d:
        admin = d.proxy.admin_url
        assert admin != d.url
        for path, where in (
            ("/metrics", admin),
            ("/instances", admin),
            ("/plan", admin),
            ("/requests", admin),
            ("/ui", admin),
            ("/v1/models", d.url),
        ):
            for url in (admin, d.url):
                async with d.http.get(url + path) as response:
                    assert response.status == (200 if url == where else 404), (url, path)
        for url in (admin, d.url):
            for path in ("/health", "/ready"):
                async with d.http.get(url + path) as response:
                    assert response.status == 200 and "127.0.0.1" not in await response.text()
            async with d.http.post(url + "/v1/metaserver", json={"request_id": "cmpl-x-0"}) as response:
                assert response.status == 404 and "waits for a prefill" in await response.text()
