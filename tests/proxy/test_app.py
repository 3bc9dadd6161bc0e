"""The wiring, in this process: what settings do to it, and how it ends."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from proxy.app import Proxy
from proxy.settings import ProxySettings
from proxy.vision import FAMILIES
from tests.fakes.deployment import FAST, deployment
from tests.fakes.media import chat
from tests.fakes.native import ENGINES, Decode, Encoder, Language, Prefill
from tests.proxy.test_measuring import hosted, parts


@pytest.mark.parametrize("measure", ["never", "all"])
async def test_media_are_measured_before_planning_where_that_is_asked_for(measure: str) -> None:
    async with hosted() as host, deployment("1e1b", measure_urls=measure, vision="tiny=qwen3_vl") as d:
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


async def test_shutdown_cuts_what_outlives_the_grace_time() -> None:
    async with Language() as engine, aiohttp.ClientSession() as http:
        engine.gate = asyncio.Event()
        proxy = Proxy(ProxySettings(decode_servers_urls=engine.url, **(FAST | {"grace_timeout": 0.1})))
        async with proxy.serving():
            await proxy.health.tick()
            asking = asyncio.create_task(http.post(f"{proxy.url}/v1/chat/completions", json=chat()))
            await engine.until(lambda: engine.running == 1)
        with pytest.raises(aiohttp.ClientError):
            await asking
        await engine.until(lambda: engine.aborted == 1)
        assert proxy.balancer.ledger.leases() == 0


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
