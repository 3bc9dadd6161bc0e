"""The wiring, in this process: what settings do to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.app import Proxy
from proxy.auth.keys import made
from proxy.core import State
from proxy.media.vision import FAMILIES
from proxy.settings import ProxySettings
from proxy.tls import Listener
from tests.fakes.deployment import FAST, Deployment, deployment
from tests.fakes.media import chat
from tests.fakes.native import ENGINES, Encoder, Language
from tests.proxy.media.test_measuring import hosted, parts
from tests.support.tls import Authority
from tests.support.waiting import until


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


async def test_what_engines_hold_is_known_after_another_configuration_too() -> None:
    async with deployment("2b", policy="affinity") as d:
        assert (await d.post(chat(text="all of them know " * 2000))).status == 200
        planner = d.proxy.planner
        assert len(planner._drafts._prefixes) > 0
        d.proxy.go_by(changed(d, answer_timeout=7.0, max_queue=3))
        assert d.proxy.planner is planner
        d.proxy.go_by(changed(d, link_rates="rack=1e9"))
        assert d.proxy.planner is not planner and d.proxy.planner._sight.links.rack == 1e9


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
