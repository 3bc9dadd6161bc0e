"""What the end of a leg says of its instance: circuits that open and close by real calls, and who is not to blame."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest

from proxy.breaker import Circuit
from proxy.core import Instance
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat


def only(d: Deployment) -> Instance:
    (instance,) = d.proxy.fleet
    return instance


def circuit(d: Deployment) -> Circuit:
    return d.proxy.health.circuit(only(d))


async def test_failures_in_a_row_keep_an_engine_from_new_legs_and_a_trial_brings_it_back() -> None:
    async with deployment("1b", breaker_failures=2, breaker_delay=0.3) as d:
        engine = d.combined[0]
        engine.fail(Fault(Kind.STATUS, status=500), Fault(Kind.RESET))
        assert [(await d.post(chat())).status for _ in range(2)] == [500, 502]
        opened = time.monotonic()
        answer = await d.post(chat())
        if time.monotonic() - opened < 0.25:
            assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "no_instance", "1")
            assert answer.error["message"] == "no combined engine is ready (1 OPEN)"
            assert len(engine.calls) == 2, "refused at once, without asking"
        shown = (await d.get("/instances")).json["instances"][0]
        assert shown["state"] == "READY" and shown["circuit"] in ("OPEN", "HALF_OPEN")
        async with asyncio.timeout(10):
            while circuit(d) is Circuit.OPEN:
                await asyncio.sleep(0.01)
        assert (await d.post(chat())).status == 200
        assert circuit(d) is Circuit.CLOSED
        metrics = (await d.get("/metrics")).body.decode()
        assert f'triptych_circuit_openings_total{{instance="{engine.netloc}",role="both"}} 1.0' in metrics


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_clients_mistakes_are_not_the_engines_fault(status: int) -> None:
    async with deployment("1b", breaker_failures=2) as d:
        d.combined[0].fail(*[Fault(Kind.STATUS, status=status)] * 6)
        assert [(await d.post(chat())).status for _ in range(6)] == [status] * 6
        assert circuit(d) is Circuit.CLOSED
        assert (await d.post(chat())).status == 200


async def test_clients_that_hang_up_are_not_the_engines_fault() -> None:
    async with deployment("1b", breaker_failures=1) as d:
        engine = d.combined[0]
        engine.always = Fault(Kind.HANG)
        for number in range(1, 4):
            async with aiohttp.ClientSession() as http:
                asking = asyncio.create_task(http.post(f"{d.url}/v1/chat/completions", json=chat()))
                await engine.until(lambda: engine.running == 1)
                asking.cancel()
                await asyncio.wait([asking])
                await engine.until(lambda number=number: engine.aborted == number)
        await d.settle()
        assert circuit(d) is Circuit.CLOSED


async def test_a_broken_stream_counts_against_its_engine() -> None:
    async with deployment("1b", breaker_failures=1) as d:
        d.combined[0].fail(Fault(Kind.TRUNCATED, after=2))
        await d.post(chat(stream=True))
        assert circuit(d) is Circuit.OPEN


async def test_a_restart_that_probes_have_seen_closes_the_circuit() -> None:
    async with deployment("1b", breaker_failures=1, breaker_delay=60.0) as d:
        engine = d.combined[0]
        engine.fail(Fault(Kind.RESET))
        await d.post(chat())
        assert circuit(d) is Circuit.OPEN
        await engine.stop()
        await d.proxy.health.tick()
        assert d.down() == {engine.netloc}, "one refused probe is enough"
        await engine.start()
        await d.proxy.health.tick()
        assert circuit(d) is Circuit.CLOSED
        assert (await d.post(chat())).status == 200


async def test_a_busy_engine_is_left_alone_while_others_serve() -> None:
    async with deployment("2b") as d:
        d.combined[0].always = Fault(Kind.STATUS, status=429, retry_after="30")
        assert [(await d.post(chat())).status for _ in range(6)] == [200] * 6
        assert len(d.combined[0].calls) == 1
