"""The wiring, in this process: what settings do to it, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from proxy.app import Proxy
from proxy.core import State
from proxy.keys import made
from proxy.settings import ProxySettings
from proxy.tls import Listener
from proxy.vision import FAMILIES
from tests.fakes.deployment import FAST, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat
from tests.fakes.native import ENGINES, Decode, Encoder, Engine, Language, Prefill
from tests.proxy.test_measuring import hosted, parts
from tests.support.tls import Authority
from tests.support.waiting import eventually, until


@pytest.mark.parametrize("measure", ["never", "all"])
async def test_media_are_measured_before_planning_where_that_is_asked_for(measure: str) -> None:
    here = {"media_networks": "127.0.0.0/8", "measure_urls": measure, "vision": "tiny=qwen3_vl"}
    async with hosted() as host, deployment("1e1b", **here) as d:
        assert d.proxy.costs.visions.of("tiny") is FAMILIES["qwen3_vl"]
        assert (await d.post(chat(*parts(f"{host.url}/x")))).status == 200
        assert len(host.asked) == (measure == "all"), "this encoder fetches nothing"
        assert isinstance(d.proxy.costs.sizes.find(f"{host.url}/x"), tuple), "the encoder's word"
        assert (await d.post(chat(*parts(f"{host.url}/x")))).status == 200
        assert len(host.asked) == (measure == "all"), "once is enough"


class Telling(Encoder):
    """Says how it cuts images, as our own encoders do."""

    async def _info(self, request: web.Request) -> web.Response:
        vision = {"model_type": "qwen3_vl", "vision_config": {}, "image_processor": {"merge_size": 4}, "itemsize": 4}
        said = {"engine": "triptych", "version": "0", "role": self.role, "model": "tiny", "vision": vision}
        return web.json_response(said)


async def test_an_encoder_tells_how_its_images_become_tokens() -> None:
    async with deployment("1e1b", make={**ENGINES, "e": Telling}) as d:
        found = d.proxy.costs.visions.of("tiny")
        assert (found.family, found.merge, found.embedding_bytes) == ("qwen3_vl", 4, 4 * 4096 * 4)
        shown = (await d.get("/instances")).json["instances"][0]
        assert shown["facts"]["vision"]["max_pixels"] == found.max_pixels, "people can see it"


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


def changed(d: Deployment, **given: Any) -> ProxySettings:
    return d.proxy.settings.model_copy(update=given)


async def test_other_settings_are_for_requests_that_begin_after_them() -> None:
    async with deployment("2b", answer_timeout=30.0, policy="round_robin") as d:
        gate = asyncio.Event()
        for engine in d.combined:
            engine.gate = gate
        asking = asyncio.create_task(d.post(chat()))
        await until(lambda: sum(engine.running for engine in d.combined) == 1)
        d.proxy.go_by(changed(d, answer_timeout=0.05, max_attempts=1, max_concurrent=2, max_queue=0))
        answer = await d.post(chat())
        assert (answer.status, answer.error["code"], answer.error["attempts"]) == (504, "stage_timeout", 1)
        d.proxy.go_by(changed(d, max_concurrent=1))
        assert (await d.post(chat())).error["code"] == "queue_full"
        gate.set()
        assert (await asking).status == 200, "by the patience that it began with"


async def test_who_waits_for_a_place_gets_one_of_those_that_a_reload_adds() -> None:
    async with deployment("1b", max_concurrent=1) as d:
        gate = d.combined[0].gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await until(lambda: d.proxy.gate.admission.waiting == 1)
        d.proxy.go_by(changed(d, max_concurrent=2))
        await d.combined[0].until(lambda: d.combined[0].running == 2)
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]


async def test_another_policy_chooses_with_the_loads_that_are_there() -> None:
    async with deployment("2b", policy="round_robin") as d:
        gate = d.combined[0].gate = d.combined[1].gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(3)]
        await until(lambda: sum(engine.running for engine in d.combined) == 3)
        d.proxy.go_by(changed(d, policy="least_loaded"))
        asking.append(asyncio.create_task(d.post(chat())))
        await until(lambda: [engine.running for engine in d.combined] == [2, 2])
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 4


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
                    assert response.status == 200
            async with d.http.post(url + "/v1/metaserver", json={"request_id": "cmpl-x-0"}) as response:
                assert response.status == 404 and "waits for a prefill" in await response.text()


async def test_everything_may_be_secured_at_once(tmp_path: Path) -> None:
    """Clients with certificates and keys, admins with a key on a port of their own, engines with both."""
    ca, engine = Authority(tmp_path), Language()
    files, mine = ca.files("proxy", ca=ca.path), ca.files("me", "me")
    engine.tls, engine.credential = Listener(ca.files("engine", ca=ca.path)).context, "engines'"
    key, digest = made(bytes(32))
    (tmp_path / "keys.yaml").write_text(f"- {{name: acme, hash: '{digest}'}}")
    async with engine:
        settings = ProxySettings(
            decode_servers_urls=engine.url,
            **FAST,
            tls_cert=files.cert,
            tls_key=files.key,
            tls_client_ca=files.ca,
            engine_ca=ca.path,
            engine_cert=mine.cert,
            engine_cert_key=mine.key,
            engine_key="engines'",
            admin_key="s3cret",
            admin_port=0,
            api_keys=tmp_path / "keys.yaml",
        )
        proxy = Proxy(settings)
        async with proxy.serving(), aiohttp.ClientSession() as http:
            await proxy.health.tick()
            called_back_at = await proxy.metaserver.url_for(next(iter(proxy.fleet)))
            assert proxy.url.startswith("https:") and called_back_at.startswith("https:")
            ask = {"url": f"{proxy.url}/v1/chat/completions", "json": chat()}
            async with http.post(**ask, ssl=ca.trusting(mine), headers={"authorization": f"Bearer {key}"}) as response:
                assert response.status == 200, await response.text()
            async with http.post(**ask, ssl=ca.trusting(mine)) as response:
                assert response.status == 401
            with pytest.raises(aiohttp.ClientError):
                await http.post(**ask, ssl=ca.trusting(), headers={"authorization": f"Bearer {key}"})
            async with http.get(f"{proxy.admin_url}/metrics", ssl=ca.trusting()) as response:
                assert response.status == 200
            async with http.delete(f"{proxy.admin_url}/instances?url=x", ssl=ca.trusting()) as response:
                assert response.status == 401
        assert engine.calls and all(call.headers["authorization"] == "Bearer engines'" for call in engine.calls)


async def test_certificates_are_read_again_with_other_settings(tmp_path: Path) -> None:
    old, new, engine = Authority(tmp_path, "old"), Authority(tmp_path, "new"), Language()
    files = old.files("proxy")
    async with engine:
        settings = ProxySettings(decode_servers_urls=engine.url, tls_cert=files.cert, tls_key=files.key, **FAST)
        proxy = Proxy(settings)
        async with proxy.serving(), aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
            async with http.get(f"{proxy.url}/health", ssl=old.trusting()) as response:
                assert response.status == 200
            new.files("proxy")
            proxy.go_by(settings)
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.get(f"{proxy.url}/health", ssl=old.trusting())
            async with http.get(f"{proxy.url}/health", ssl=new.trusting()) as response:
                assert response.status == 200


async def test_other_lists_change_the_fleet_and_drop_no_request() -> None:
    async with deployment("2b") as d:
        gate = d.combined[0].gate = d.combined[1].gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await until(lambda: [engine.running for engine in d.combined] == [1, 1])
        d.proxy.go_by(changed(d, decode_servers_urls=d.combined[1].url))
        states = {instance.url: instance.state for instance in d.proxy.fleet}
        assert states == {d.combined[0].url: State.DRAINING, d.combined[1].url: State.READY}
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]
        assert (await d.post(chat())).status == 200 and len(d.combined[0].calls) == 1
        await d.proxy.health.tick()
        assert [instance.url for instance in d.proxy.fleet] == [d.combined[1].url]


async def test_another_limit_of_bodies_is_for_new_connections() -> None:
    async with deployment("1b") as d:
        d.proxy.go_by(changed(d, max_body_bytes=10))
        async with aiohttp.ClientSession() as http, http.post(f"{d.url}/v1/chat/completions", json=chat()) as response:
            assert response.status == 413
