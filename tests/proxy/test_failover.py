"""Prefill and decode that fail before the first byte, in both orders: who is asked instead, what the client sees."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import aiohttp
import orjson
import pytest

from proxy.app import Proxy
from proxy.core import BOTH
from proxy.settings import ProxySettings
from tests.fakes.deployment import FAST, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import PIECES, Engine, Language

FAULTS = [
    pytest.param(Fault(Kind.RESET), id="reset"),
    pytest.param(Fault(Kind.HANG), id="hang"),
    pytest.param(Fault(Kind.STATUS, status=500), id="500"),
    pytest.param(Fault(Kind.STATUS, status=429), id="429"),
    pytest.param(Fault(Kind.GARBAGE), id="garbage"),
    pytest.param(Fault(Kind.TRUNCATED), id="truncated"),
    pytest.param(Fault(Kind.ERROR_EVENT), id="error-event"),
]
TIMEOUTS: dict[str, Any] = {"prefill_timeout": 0.4, "first_token_timeout": 0.8, "answer_timeout": 0.8}


def group(d: Deployment, stage: str) -> list[Any]:
    return {"prefill": d.prefills, "decode": d.decodes, "both": d.combined}[stage]


def whole_text(body: bytes, stream: bool) -> str:
    if not stream:
        return str(orjson.loads(body)["choices"][0]["message"]["content"])
    data = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return "".join(orjson.loads(one)["choices"][0]["delta"].get("content", "") for one in data[:-1])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("topology", "handoff", "stage"),
    [
        ("1e2p2d", "push", "prefill"),
        ("1e2p2d", "push", "decode"),
        ("1e2p2d", "pull", "prefill"),
        ("1e2p2d", "pull", "decode"),
        ("1e2b", "push", "both"),
    ],
)
async def test_another_instance_serves_it_whole(
    topology: str, handoff: str, stage: str, fault: Fault, stream: bool
) -> None:
    async with deployment(topology, handoff, **(TIMEOUTS if fault.kind is Kind.HANG else {})) as d:
        engines: list[Language] = group(d, stage)
        faults = deque([fault])  # for whoever is asked first
        for engine in engines:
            engine.faults = faults
        answer = await d.post(chat(part(image()), stream=stream), x_request_id="me")
        assert answer.status == 200, answer.body
        assert whole_text(answer.body, stream) == "".join(PIECES)
        if stream:
            assert answer.body in [engine.streamed for engine in (*d.decodes, *d.combined)]
        assert sorted(call.id for engine in engines for call in engine.calls) == ["me", "me-2"]
        assert all(len(engine.calls) == 1 for engine in engines), "nobody is asked twice"
        assert len(d.encoders[0].calls) == 1, "its embeddings are used again"
        assert f"{engines[0].role}=" in answer.route
        await d.settle()
        if fault.kind is Kind.HANG:
            assert sum(engine.aborted for engine in engines) == 1


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_dead_instance_costs_one_refused_connection(stage: str, handoff: str) -> None:
    async with deployment("2p2d", handoff) as d:
        await group(d, stage)[0].stop()
        for _ in range(4):
            assert (await d.post(chat())).status == 200
        assert d.down() == {group(d, stage)[0].netloc}


async def test_prefilled_kv_that_nobody_fetched_is_used_again() -> None:
    async with deployment("1p2d", "pull") as d:
        await d.decodes[0].stop()
        await asyncio.gather(*(d.post(chat()) for _ in range(2)))
        assert len(d.prefills[0].calls) == 2, "one each, although a decode engine was not there"
        served = d.decodes[1].calls
        assert sorted(call.id.rpartition("-")[2] for call in served).count("2") == 1


async def test_what_decode_tells_of_prefill_moves_the_prefill() -> None:
    lost = Fault(Kind.STATUS, status=502, error={"message": "gone", "code": "kv_gone", "stage": "prefill"})
    async with deployment("2p1d", "pull", breaker_failures=1) as d:
        d.decodes[0].fail(lost)
        answer = await d.post(chat())
        assert answer.status == 200, answer.body
        assert [len(engine.calls) for engine in d.engines] == [1, 1, 2]


async def test_a_combined_engine_stands_in_for_a_pair() -> None:
    async with deployment("1p1d", "push") as d, Language() as combined:
        d.proxy.fleet.join(combined.url, BOTH, "native")
        await d.proxy.health.tick()
        d.prefills[0].always = Fault(Kind.STATUS, status=500)
        answer = await d.post(chat())
        assert (answer.status, answer.route.partition(";")[0]) == (200, "PD")
        d.proxy.fleet.remove(combined.url)


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_clients_mistake_is_passed_on_and_tried_nowhere_else(stage: str, handoff: str) -> None:
    async with deployment("2p2d", handoff) as d:
        for engine in group(d, stage):
            engine.always = Fault(Kind.STATUS, status=400, error="too long")
        answer = await d.post(chat())
        assert (answer.status, answer.error["message"], answer.error["attempts"]) == (400, "too long", 1)
        assert sum(len(engine.calls) for engine in group(d, stage)) == 1


@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_the_budget_is_kept_and_the_last_word_passed_on(attempts: int) -> None:
    async with deployment("5b", max_attempts=attempts) as d:
        for engine in d.combined:
            engine.always = Fault(Kind.STATUS, status=500, error="ill")
        answer = await d.post(chat())
        assert (answer.status, answer.error["message"], answer.error["attempts"]) == (500, "ill", attempts)
        assert sorted(len(engine.calls) for engine in d.combined) == [0] * (5 - attempts) + [1] * attempts


async def test_all_busy_is_a_429_with_the_time_to_come_again() -> None:
    async with deployment("2b") as d:
        d.combined[0].always = d.combined[1].always = Fault(Kind.STATUS, status=429, retry_after="3")
        answer = await d.post(chat())
        assert (answer.status, answer.headers["Retry-After"], answer.error["attempts"]) == (429, "3", 2)


async def test_after_the_first_byte_nothing_is_tried_again() -> None:
    async with deployment("2b") as d:
        for engine in d.combined:
            engine.fail(Fault(Kind.TRUNCATED, after=2))
        answer = await d.post(chat(stream=True))
        assert b"[DONE]" not in answer.body and b'"attempts":1' in answer.body
        assert sum(len(engine.calls) for engine in d.combined) == 1


# ---- the request's own deadline


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
async def test_a_deadline_ends_every_leg(stage: str, handoff: str, stream: bool) -> None:
    async with deployment("1e1p1d", handoff) as d:
        engine: Engine = {"encode": d.encoders, "prefill": d.prefills, "decode": d.decodes}[stage][0]  # type: ignore[index]
        engine.fail(Fault(Kind.HANG))
        for seconds in ("0.3", "5"):  # a busy machine may not come to the engine within the first
            answer = await d.post(chat(part(image()), stream=stream), x_request_timeout=seconds)
            assert (answer.status, answer.error["code"], answer.error["attempts"]) == (504, "request_timeout", 1)
            if engine.calls:
                break
        await engine.until(lambda: engine.aborted == 1)
        await d.settle()
        for decode in d.decodes:
            assert all(status in (404, 500) for status, _ in decode.callbacks)


async def test_a_deadline_holds_over_all_attempts_and_in_the_middle_of_a_stream() -> None:
    async with deployment("2b", request_timeout=0.4) as d:
        faults = deque([Fault(Kind.STATUS, status=500), Fault(Kind.STALL, after=2)])
        for engine in d.combined:
            engine.faults = faults
        answer = await d.post(chat(stream=True))
        assert answer.status == 200 and b"[DONE]" not in answer.body
        assert b'"code":"request_timeout"' in answer.body and b'"attempts":2' in answer.body


@pytest.mark.parametrize("asked", ["soon", "0", "-1", "inf", "nan"])
async def test_a_deadline_that_is_none_is_refused(asked: str) -> None:
    async with deployment("1b") as d:
        answer = await d.post(chat(), x_request_timeout=asked)
        assert (answer.status, answer.error["param"]) == (400, "x-request-timeout")


async def test_a_callback_that_comes_too_late_finds_nobody() -> None:
    async with deployment("1p1d", "push") as d:
        await d.post(chat(), x_request_id="me")
        late = await d.post({"request_id": "chatcmpl-me"}, "/v1/metaserver")
        assert late.status == 404


# ---- admission


async def test_what_does_not_fit_waits_and_the_urgent_go_first() -> None:
    async with deployment("1b", max_concurrent=1, max_queue=3) as d:
        engine = d.combined[0]
        gate = engine.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat(), x_request_id="first"))]
        await engine.until(lambda: engine.running == 1)
        for number, priority in enumerate((5, 5, -1), start=1):
            asking.append(asyncio.create_task(d.post(chat(priority=priority), x_request_id=f"w{number}")))
            async with asyncio.timeout(10):
                while d.proxy.gate.admission.waiting != number:
                    await asyncio.sleep(0.005)
        refused = await d.post(chat(), x_priority="7")
        assert (refused.status, refused.error["code"], refused.headers["Retry-After"]) == (429, "queue_full", "1")
        assert b"triptych_requests_queued 3.0" in (await d.get("/metrics")).body
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 4
        assert [call.id for call in engine.calls] == ["first", "w3", "w1", "w2"]
        assert d.proxy.gate.admission.requests == 0


async def test_a_wait_has_an_end_and_a_body_may_be_too_large() -> None:
    async with deployment("1b", max_concurrent=1, queue_timeout=0.1, max_bytes_in_flight=4000) as d:
        engine = d.combined[0]
        engine.always = Fault(Kind.HANG)
        asking = asyncio.create_task(d.post(chat()))
        await engine.until(lambda: engine.running == 1)
        late = await d.post(chat())
        assert (late.status, late.error["code"], "Retry-After" in late.headers) == (503, "queue_timeout", True)
        large = await d.post(chat(text="x" * 5000))
        assert large.status == 413, large.body
        asking.cancel()
        await engine.until(lambda: engine.running == 0)


async def test_stopping_ends_every_leg_and_empties_the_queue() -> None:
    async with Language() as engine, aiohttp.ClientSession() as http:
        engine.always = Fault(Kind.HANG)
        flags = FAST | {"grace_timeout": 0.2, "max_concurrent": 1, "decode_servers_urls": engine.url}
        proxy = Proxy(ProxySettings(**flags))

        async def ask() -> int:
            async with http.post(f"{proxy.url}/v1/chat/completions", json=chat()) as response:
                return response.status

        async with proxy.serving():
            await proxy.health.tick()
            asking = [asyncio.create_task(ask())]
            await engine.until(lambda: engine.running == 1)
            asking.append(asyncio.create_task(ask()))
            async with asyncio.timeout(10):
                while proxy.gate.admission.waiting != 1:
                    await asyncio.sleep(0.005)
        await engine.until(lambda: engine.aborted == 1 and engine.running == 0)
        ended, waited = await asyncio.gather(*asking, return_exceptions=True)
        assert waited == 503
        assert ended == 503 or isinstance(ended, aiohttp.ClientError)
        proxy.balancer.ledger.check()
        assert not proxy.balancer.ledger.leases()
        assert (proxy.gate.admission.requests, proxy.gate.admission.waiting) == (0, 0)
