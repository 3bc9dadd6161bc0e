"""What an engine has to show before it serves, over real sockets."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from blake3 import blake3

from proxy.core import BOTH, Instance, Role, State
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import ENGINES, Encoder, Language
from tests.fakes.vllm import Combined, World
from tests.fakes.vllm import Encoder as VllmEncoder
from tests.fakes.vllm import Prefill as VllmPrefill


async def join(d: Deployment, engine: Any, role: Role, dialect: str = "auto") -> Instance:
    url, _, query = engine.url.partition("?")
    facts = {name: int(value) for name, _, value in [query.partition("=")] if name}
    instance = d.proxy.fleet.join(url, role, dialect, facts)
    await d.proxy.health.tick()
    return instance


async def test_families_find_their_own_and_the_model_says_which() -> None:
    world = World()
    async with deployment("1e1b") as d, VllmEncoder(world) as encoder, Combined(world) as combined:
        await join(d, combined, BOTH)
        await join(d, encoder, Role.ENCODE)
        assert {i.dialect: i.state for i in d.proxy.fleet} == {"native": State.READY, "vllm": State.READY}
        for instance in d.proxy.fleet:
            instance.model = f"model-of-{instance.dialect}"
        for family, engine in (("native", d.combined[0]), ("vllm", combined)):
            before = len(engine.calls)
            answer = await d.post(chat(part(image())) | {"model": f"model-of-{family}"})
            assert answer.status == 200, answer.body
            assert len(engine.calls) == before + 1
        for engine in (encoder, combined):
            d.proxy.fleet.remove(engine.url)


async def test_an_engine_of_another_family_that_can_never_serve_is_refused_and_told_why() -> None:
    async with deployment("1e1b") as d, VllmEncoder(World()) as encoder:
        instance = await join(d, encoder, Role.ENCODE)
        assert instance.state is State.JOINING
        assert "it speaks vllm" in instance.reason and "among native engines" in instance.reason
        assert (await d.post(chat(part(image())))).status == 200
        assert not encoder.calls
        d.proxy.fleet.remove(encoder.url)


async def test_one_that_served_is_taken_out_when_the_others_turn_out_to_be_of_another_family() -> None:
    async with VllmEncoder(World()) as encoder, deployment("1b") as d:
        d.combined[0]._info = d.combined[0]._models  # type: ignore[method-assign]
        await d.combined[0].stop()
        for instance in list(d.proxy.fleet):
            d.proxy.fleet.remove(instance.url)
        other = d.proxy.fleet.join(d.combined[0].url, BOTH, "auto")
        instance = await join(d, encoder, Role.ENCODE)
        assert (instance.state, other.dialect) == (State.READY, "auto"), "nobody knows yet"
        d.combined[0]._info = type(d.combined[0])._info.__get__(d.combined[0])  # type: ignore[method-assign]
        await d.combined[0].start()
        await d.proxy.health.tick()
        assert other.state is State.READY
        assert instance.state is State.DOWN and "among native engines" in instance.reason
        await d.proxy.health.tick()
        assert instance.state is State.DOWN, "and stays so"
        d.proxy.fleet.remove(encoder.url)


async def test_our_encoder_feeds_vllm_engines() -> None:
    world = World(files={blake3(image()).hexdigest()})
    async with deployment("1b", "auto", world.engines()) as d, Encoder() as encoder:
        await join(d, encoder, Role.ENCODE)
        answer = await d.post(chat(part(image())))
        assert answer.status == 200 and answer.route.startswith("E-PD; "), answer.body
        (call,) = d.combined[0].served
        entry = next(iter(call.body["ec_transfer_params"].values()))
        assert entry["where"] == {"at": encoder.netloc}
        d.proxy.fleet.remove(encoder.url)


async def test_a_dialect_in_the_url_is_believed_and_what_is_said_of_it_taken_along() -> None:
    async with deployment("1b") as d, Combined(World(version="0.30.0")) as engine:
        instance = await join(d, engine, BOTH, "ascend")
        assert (instance.state, instance.dialect, instance.model) == (State.READY, "ascend", "tiny")
        assert instance.facts["version"] == "0.30.0"
        d.proxy.fleet.remove(engine.url)


async def test_vllm_on_unknown_hardware_has_to_be_named() -> None:
    async with deployment("1b", "auto", World().engines()) as d, Combined(World(version="0.26.0+empty")) as engine:
        instance = await join(d, engine, BOTH)
        assert instance.state is State.JOINING and f"ascend+{engine.url}" in instance.reason
        assert not engine.calls, "not even for a warm-up"
        d.proxy.fleet.remove(engine.url)
        assert (await join(d, engine, BOTH, "ascend")).state is State.READY
        d.proxy.fleet.remove(engine.url)


async def test_a_prefill_engine_without_its_bootstrap_server_cannot_be_met() -> None:
    world = World(kv="mooncake")
    async with deployment("1p1d", "auto", world.engines()) as d, VllmPrefill(world) as engine:
        engine.engine_ids = {}
        instance = await join(d, engine, Role.PREFILL)
        assert instance.state is State.JOINING and "does not tell its engine id" in instance.reason
        engine.engine_ids = {"0": "e"}
        await d.proxy.health.tick()
        assert instance.state is State.READY and instance.facts["engine_ids"] == {"0": "e"}
        d.proxy.fleet.remove(instance.url)


async def test_an_engine_started_anew_is_believed_anew() -> None:
    world = World(kv="mooncake")
    async with deployment("1p1d", "auto", world.engines(), probe_failures=1) as d:
        (instance,) = [i for i in d.proxy.fleet if i.role is Role.PREFILL]
        port = instance.facts["bootstrap_port"]
        await d.prefills[0].stop()
        await d.proxy.health.tick()
        world.version, d.prefills[0].engine_ids = "0.33.0", {"0": "another"}
        await d.prefills[0].start()
        await d.proxy.health.tick()
        assert instance.state is State.READY
        assert (instance.facts["version"], instance.facts["engine_ids"]) == ("0.33.0", {"0": "another"})
        assert instance.facts["bootstrap_port"] == port


async def test_an_engine_that_asks_for_a_key_is_known_and_serves_who_brings_it() -> None:
    class Keyed(Combined):
        async def _models(self, request: web.Request) -> web.Response:
            return web.json_response({"error": "Unauthorized"}, status=401)

    async with deployment("1b", "auto", World().engines(), forward_authorization=True) as d, Keyed(World()) as engine:
        engine.fail(Fault(Kind.STATUS, status=401, error="Unauthorized"))
        instance = await join(d, engine, BOTH)
        assert (instance.dialect, instance.state) == ("vllm", State.READY)
        assert instance.facts["known_by"] == "GET /version says 0.32.0"
        d.proxy.fleet.remove(engine.url)


@pytest.mark.parametrize("family", ["vllm", "native", "auto"])
async def test_an_engine_whose_key_is_not_known_serves_nobody_until_it_is(family: str) -> None:
    make = World().engines() if family == "vllm" else ENGINES
    async with deployment("1b", "auto", make) as d, make["b"]() as engine:
        engine.credential = "s3cret"
        instance = await join(d, engine, BOTH, family)
        assert instance.state is State.JOINING and instance.reason.startswith("it asks for a key")
        instance.secret = "s3cret"
        await d.proxy.health.tick()
        assert instance.state is State.READY
        d.proxy.fleet.remove(engine.url)


async def test_a_warm_up_that_fails_is_told_and_tried_again() -> None:
    async with deployment("1b", "auto", World().engines()) as d, Combined(World()) as engine:
        engine.fail(Fault(Kind.STATUS, status=500, error="no kernels"))
        instance = await join(d, engine, BOTH)
        assert instance.reason == "its warm-up request failed: no kernels"
        await d.proxy.health.tick()
        assert instance.state is State.READY
        d.proxy.fleet.remove(engine.url)


async def test_a_stranger_is_told_how_to_be_let_in() -> None:
    async with deployment("1b") as d:

        class Stranger(Language):
            def routes(self) -> list[web.RouteDef]:
                return [route for route in super().routes() if route.path == "/health"]

        async with Stranger() as engine:
            instance = await join(d, engine, BOTH)
            assert instance.state is State.JOINING
            assert "(native, vllm, ascend, sglang)" in instance.reason and "in the URL" in instance.reason
            d.proxy.fleet.remove(engine.url)
