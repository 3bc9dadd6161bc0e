"""The probe clock over real sockets: joining, failing, coming back, and engines that are listed wrongly."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from proxy.breaker import Circuit
from proxy.core import State
from tests.fakes.deployment import deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat
from tests.fakes.native import Decode, Language


async def test_an_engine_is_down_after_failures_in_a_row_and_back_after_one_success() -> None:
    async with deployment("1b", probe_failures=2) as d:
        (instance,) = d.proxy.fleet
        engine = d.combined[0]
        assert (instance.state, instance.dialect, instance.model) == (State.READY, "native", "tiny")
        engine.healthy = False
        await d.proxy.health.tick()
        assert instance.state is State.READY
        engine.healthy = True
        await d.proxy.health.tick()
        engine.healthy = False
        await d.proxy.health.tick()
        assert instance.state is State.READY, "not in a row"
        await d.proxy.health.tick()
        assert (instance.state, instance.reason) == (State.DOWN, "GET /health answers 503")
        answer = await d.post(chat())
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert answer.error["message"] == "no combined engine is ready (1 DOWN)"
        assert (await d.get("/ready")).status == 503
        engine.healthy = True
        await d.proxy.health.tick()
        assert instance.state is State.READY
        assert (await d.post(chat())).status == 200


async def test_a_dead_engine_is_down_and_back_when_it_is_started_again() -> None:
    async with deployment("1b", probe_failures=1) as d:
        (instance,) = d.proxy.fleet
        await d.combined[0].stop()
        await d.proxy.health.tick()
        assert instance.state is State.DOWN and "cannot be reached" in instance.reason
        await d.combined[0].start()
        await d.proxy.health.tick()
        assert instance.state is State.READY


async def test_one_failed_probe_is_enough_where_legs_have_failed_as_well() -> None:
    """Else an engine that was started again between two probes would be kept from work for its predecessor's death."""
    async with deployment("2b", breaker_failures=1) as d:
        instance, engine = d.proxy.fleet.get(d.combined[0].url), d.combined[0]
        assert instance is not None
        engine.fail(Fault(Kind.RESET))
        assert [(await d.post(chat())).status for _ in range(2)] == [200] * 2
        assert d.proxy.health.circuit(instance) is Circuit.OPEN
        await d.proxy.health.tick()
        assert instance.state is State.READY, "its circuit alone says that it is unwell"
        engine.healthy = False
        await d.proxy.health.tick()
        assert instance.state is State.DOWN
        engine.healthy = True
        await d.proxy.health.tick()
        assert (instance.state, d.proxy.health.circuit(instance)) == (State.READY, Circuit.CLOSED)


async def test_a_hung_engine_fails_its_probe_in_time() -> None:
    async with deployment("1b", probe_failures=1, probe_timeout=0.1) as d:
        (instance,) = d.proxy.fleet

        async def hang(request: web.Request) -> web.Response:
            await asyncio.Event().wait()
            return web.Response()

        engine = d.combined[0]
        engine._health = hang  # type: ignore[method-assign]
        await engine.stop()
        await engine.start()
        await d.proxy.health.tick()
        assert instance.state is State.DOWN and "in time" in instance.reason


@pytest.mark.parametrize(
    ("fake", "says"),
    [(Decode, "it is started with the role 'decode', but listed as 'both'"), (None, "of no family that is known here")],
)
async def test_an_engine_that_is_not_what_it_is_listed_as_never_serves(fake: type[Decode] | None, says: str) -> None:
    async with deployment("1b") as d:
        engine = (fake or Language)()
        if fake is None:
            engine._info = engine._models  # type: ignore[method-assign]
        async with engine:
            instance = d.proxy.fleet.join(engine.url, next(iter(d.proxy.fleet)).role, "auto")
            for _ in range(5):
                await d.proxy.health.tick()
            assert instance.state is State.JOINING and says in instance.reason


async def test_a_dialect_given_in_the_url_is_not_asked_for() -> None:
    async with deployment("1b") as d:
        engine = Language()
        engine._info = engine._models  # type: ignore[method-assign]
        async with engine:
            instance = d.proxy.fleet.join(engine.url, next(iter(d.proxy.fleet)).role, "native")
            await d.proxy.health.tick()
            assert instance.state is State.READY


async def test_the_clock_finds_an_engine_that_starts_late() -> None:
    engine = Language()
    await engine.start()
    await engine.stop()  # its port is known, and closed
    async with deployment("1b", probe_interval=0.02) as d:
        instance = d.proxy.fleet.join(engine.url, next(iter(d.proxy.fleet)).role, "auto")
        d.proxy.health.wake()
        async with asyncio.timeout(10):
            while instance.reason == "not probed yet":
                await asyncio.sleep(0.01)
            assert instance.state is State.JOINING
            async with engine:
                while instance.state is not State.READY:
                    await asyncio.sleep(0.01)
                d.proxy.fleet.remove(engine.url)
