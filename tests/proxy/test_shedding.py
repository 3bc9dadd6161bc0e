"""Admission by deadline over real sockets: media are shed where encoders are short, text passes, nothing leaks."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from proxy.advice.flow import Sum
from proxy.core import Role
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.media import chat, image, part
from tests.support.waiting import until

TEXT = chat(stream=True)
_shades = count()


def media(**fields: Any) -> dict[str, Any]:
    """Another image each time, of the same size: one that an encoder has or works on costs next to nothing."""
    return chat(part(image(64, 64, color=(next(_shades), 0, 0))), stream=True, **fields)


async def hold_an_encoder(d: Deployment, seconds: float) -> asyncio.Task[Answer]:
    """Let a request stay with the only encoder, which is known to take so long for one like it."""
    (encoder,) = d.encoders
    encoder.gate = asyncio.Event()
    held = asyncio.create_task(d.post(media()))
    await encoder.until(lambda: encoder.running == 1)
    work = d.proxy.balancer.ledger.load(encoder.url)
    for _ in range(20):
        d.proxy.balancer.rates[Role.ENCODE].observe(encoder.url, work, 0, seconds)
    return held


async def parked(d: Deployment, number: int) -> None:
    await until(lambda: d.proxy.gate.admission.waiting == number)


async def test_slow_encoders_shed_media_and_let_text_pass() -> None:
    async with deployment("1e1p1d", ttft_target=1.0) as d:
        held = await hold_an_encoder(d, 0.7)
        asked = [asyncio.create_task(d.post(media())) for _ in range(3)]
        await parked(d, 3)
        assert [(await d.post(TEXT)).status for _ in range(5)] == [200] * 5
        for answer in await asyncio.gather(*asked):
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert (answer.error["code"], answer.error["retryable"]) == ("target_missed", True)
            assert "within 1 s (--ttft-target" in answer.error["message"] and "for encode" in answer.error["message"]
            assert "1.4 s" in answer.error["message"] and "idle engines would take 0.7 s" in answer.error["message"]
        assert d.encoders[0].running == 1 and len(d.encoders[0].calls) == 1, "what was refused was sent nowhere"
        assert (await d.post(media(), x_ttft_target="0.5")).status == 429, "no waiting could help it"
        assert (await d.get("/metrics")).body.count(b'code="target_missed",modality="media"} 4.0') == 1
        assert d.encoders[0].gate is not None
        d.encoders[0].gate.set()
        assert (await held).status == 200
        await d.settle()
        assert repr(d.proxy.gate.admission) == "<Admission 0 requests, 0 bytes, 0 waiting>"


async def test_parked_requests_go_on_as_load_drains_the_urgent_first() -> None:
    async with deployment("1e1p1d", ttft_target=60.0, max_queue=2) as d:
        held = await hold_an_encoder(d, 40.0)
        patient = asyncio.create_task(d.post(media(), x_priority="5"))
        await parked(d, 1)
        late = asyncio.create_task(d.post(media(), x_priority="5"))
        await parked(d, 2)
        urgent = asyncio.create_task(d.post(media(user="urgent"), x_priority="-1"))
        pushed = await late
        assert (pushed.status, pushed.error["code"]) == (429, "queue_full"), "the least urgent makes way"
        encoder = d.encoders[0]
        assert encoder.gate is not None and len(encoder.calls) == 1
        encoder.gate.set()
        assert [(await task).status for task in (held, urgent, patient)] == [200] * 3
        asked = [call.body.get("user") for call in d.prefills[0].calls]
        assert asked == [None, "urgent", None]


@pytest.mark.parametrize("ends", ["client", "deadline"])
async def test_who_leaves_while_parked_leaves_nothing(ends: str) -> None:
    async with deployment("1e1p1d", ttft_target=60.0) as d:
        held = await hold_an_encoder(d, 40.0)
        headers = {"x_request_timeout": "0.1"} if ends == "deadline" else {}
        leaving = asyncio.create_task(d.post(media(), **headers))
        if ends == "deadline":
            assert (await leaving).status == 504
        else:
            await parked(d, 1)
            leaving.cancel()
        await parked(d, 0)
        assert d.proxy.gate.admission.requests == 1
        assert d.encoders[0].gate is not None
        d.encoders[0].gate.set()
        assert (await held).status == 200


async def test_who_is_parked_when_the_proxy_begins_to_stop_is_served_and_nobody_new_is() -> None:
    async with deployment("1e1p1d", ttft_target=60.0) as d:
        held = await hold_an_encoder(d, 40.0)
        waiting = asyncio.create_task(d.post(media()))
        await parked(d, 1)
        d.proxy.gate.close()
        assert (await d.post(media())).status == 503
        assert d.encoders[0].gate is not None
        d.encoders[0].gate.set()
        assert [(await held).status, (await waiting).status] == [200, 200]


async def test_a_slow_pace_parks_until_somebody_has_ended() -> None:
    async with deployment("1p1d", tpot_target=0.15) as d:
        seen = {Sum.PACES: 1e6, Sum.BATCH: 2e6, Sum.BATCH_SQUARES: 5e6, Sum.PACE: 0.2e6, Sum.BATCH_PACE: 0.5e6}
        d.proxy.sizing._flow.add(d.proxy.sizing._clock(), [*seen.items(), (Sum.KEPT, 1e9)])  # 0.1 s for each decoding
        decode = d.decodes[0]
        decode.gate = asyncio.Event()
        first = asyncio.create_task(d.post(TEXT))
        await decode.until(lambda: decode.running == 1)
        second = asyncio.create_task(d.post(TEXT))
        await parked(d, 1)
        decode.gate.set()
        assert [(await task).status for task in (first, second)] == [200, 200]


async def test_engines_that_have_nothing_to_do_turn_nobody_away() -> None:
    async with deployment("1e1b", ttft_target=1e-6, tpot_target=1e-6) as d:
        for body in (TEXT, media()):
            asked: dict[str, Any] = body
            assert (await d.post(asked)).status == 200
            await d.settle()


async def test_media_wait_for_room_for_their_embeddings_and_text_does_not() -> None:
    async with deployment("1e1p1d", max_embedding_bytes=1) as d:
        prefill = d.prefills[0]
        prefill.gate = asyncio.Event()
        first = asyncio.create_task(d.post(media()))
        await prefill.until(lambda: prefill.running == 1)
        second = asyncio.create_task(d.post(media()))
        await parked(d, 1)
        text = asyncio.create_task(d.post(TEXT))
        await prefill.until(lambda: prefill.running == 2)
        assert len(d.encoders[0].calls) == 1, "nothing is encoded that would have no place to go to"
        prefill.gate.set()
        assert [(await task).status for task in (first, second, text)] == [200] * 3
