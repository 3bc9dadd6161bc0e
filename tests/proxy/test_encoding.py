"""The encode ladder over real sockets: failed items alone elsewhere, then inline; slow ones hedged."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest

from proxy.core import Role
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part

FAULTS = [
    pytest.param(Fault(Kind.RESET), id="reset"),
    pytest.param(Fault(Kind.HANG), id="hang"),
    pytest.param(Fault(Kind.STATUS, status=500), id="500"),
    pytest.param(Fault(Kind.STATUS, status=429, retry_after="9"), id="429"),
    pytest.param(Fault(Kind.GARBAGE), id="garbage"),
    pytest.param(Fault(Kind.TRUNCATED), id="truncated"),
    pytest.param(Fault(Kind.ERROR_EVENT), id="error-in-200"),
]


def images(count: int) -> list[dict[str, Any]]:
    return [part(image(8 + 4 * number, 8)) for number in range(count)]


def items_sent(d: Deployment) -> list[list[int]]:
    """For each encoder: how many items each of its calls had."""
    return [[len(call.body["messages"][0]["content"]) for call in encoder.calls] for encoder in d.encoders]


@pytest.mark.parametrize("fault", FAULTS)
async def test_failed_items_go_alone_to_another_encoder_and_the_others_stay(fault: Fault) -> None:
    timeout = 0.4 if fault.kind is Kind.HANG else 60.0
    async with deployment("2e1p1d", encode_timeout=timeout) as d:
        bad, good = d.encoders
        bad.always = fault
        answer = await d.post(chat(*images(4)), x_request_id="me")
        assert answer.status == 200, answer.body
        assert items_sent(d) == [[2], [2, 1, 1]]
        assert sorted(call.id for call in good.calls if call.id.endswith("-2")) == sorted(
            f"{'me'}:{index}-2" for index in _lost(d)
        )
        assert len(d.prefills[0].calls[0].body["ec_transfer_params"]) == 4
        assert [len(engine.calls) for engine in (*d.prefills, *d.decodes)] == [1, 1]


def _lost(d: Deployment) -> list[int]:
    """The indices of the items that the first encoder was sent, by their order in the request."""
    order = [part["uuid"] for part in d.prefills[0].calls[0].body["messages"][0]["content"][1:]]
    return [order.index(part["uuid"]) for part in d.encoders[0].calls[0].body["messages"][0]["content"]]


async def test_a_dead_encoder_costs_one_refused_connection() -> None:
    async with deployment("2e1b") as d:
        await d.encoders[0].stop()
        for _ in range(3):
            assert (await d.post(chat(*images(2)))).status == 200
        assert d.down() == {d.encoders[0].netloc}
        assert len(d.encoders[1].calls) == 4, "the share of the dead one, alone, and then everything"


async def test_a_broken_image_is_tried_nowhere_else() -> None:
    said: dict[str, object] = {"message": "no image", "param": "messages[0].content[0]", "code": "invalid_image"}
    async with deployment("2e1b") as d:
        for encoder in d.encoders:
            encoder.always = Fault(Kind.STATUS, status=400, error=said)
        answer = await d.post(chat(*images(1)))
        assert (answer.status, answer.error["param"], answer.error["attempts"]) == (400, "messages[0].content[1]", 1)
        assert sum(len(encoder.calls) for encoder in d.encoders) == 1


async def test_nobody_is_asked_twice_and_the_budget_is_kept() -> None:
    async with deployment("4e1b", max_attempts=3) as d:
        for encoder in d.encoders:
            encoder.always = Fault(Kind.STATUS, status=500, error="ill")
        answer = await d.post(chat(*images(1)))
        assert (answer.status, answer.error["message"], answer.error["attempts"]) == (500, "ill", 3)
        assert sorted(len(encoder.calls) for encoder in d.encoders) == [0, 1, 1, 1]


async def test_all_busy_is_told_with_the_time_to_come_again() -> None:
    async with deployment("2e1b") as d:
        for encoder in d.encoders:
            encoder.always = Fault(Kind.STATUS, status=429, retry_after="7")
        answer = await d.post(chat(*images(1)))
        assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
        again = await d.post(chat(*images(1)))
        assert (again.status, again.error["code"]) == (503, "no_instance")
        assert 1 <= int(again.headers["Retry-After"]) <= 7
        assert sum(len(encoder.calls) for encoder in d.encoders) == 2, "they are left alone until then"


# ---- inline


async def test_an_engine_with_an_encoder_of_its_own_gets_only_what_could_not_be_encoded() -> None:
    async with deployment("2e1b", inline_encoding=True, max_attempts=1) as d:
        d.encoders[0].always = Fault(Kind.STATUS, status=500)
        two = images(2)
        answer = await d.post(chat(*two))
        assert answer.status == 200, answer.body
        assert answer.route.startswith("EPD; ")
        content = d.combined[0].calls[0].body["messages"][0]["content"][1:]
        assert sorted(entry["type"] for entry in content) == ["image_embeds", "image_url"]
        raw = next(entry for entry in content if entry["type"] == "image_url")
        assert raw["image_url"] in [one["image_url"] for one in two]


async def test_without_any_encoder_up_it_gets_them_at_once() -> None:
    async with deployment("1e1b", inline_encoding=True) as d:
        await d.encoders[0].stop()
        first, second = [await d.post(chat(*images(1))) for _ in range(2)]
        assert [first.status, second.status] == [200, 200]
        assert "encoders failed" in first.route and "no encoder is ready" in second.route


async def test_inline_is_off_unless_asked_for() -> None:
    async with deployment("1e1b") as d:
        d.encoders[0].always = Fault(Kind.STATUS, status=500)
        assert (await d.post(chat(*images(1)))).status == 500
        assert not d.combined[0].calls


# ---- hedging


async def test_a_slow_encoder_gets_a_rival_and_is_cancelled() -> None:
    async with deployment("2e1b", hedge_after="0.05") as d:
        faults = deque([Fault(Kind.HANG)])
        for encoder in d.encoders:
            encoder.faults = faults
        assert (await d.post(chat(*images(1)), x_request_id="me")).status == 200
        slow = next(encoder for encoder in d.encoders if encoder.aborted or encoder.running)
        await slow.until(lambda: slow.aborted == 1 and slow.running == 0)
        assert sorted(call.id for encoder in d.encoders for call in encoder.calls) == ["me:0", "me:0-h"]


async def test_a_quick_encoder_gets_none() -> None:
    async with deployment("2e1b", hedge_after="30") as d:
        assert (await d.post(chat(*images(1)))).status == 200
        assert sum(len(encoder.calls) for encoder in d.encoders) == 1


async def test_a_client_that_leaves_ends_both_rivals() -> None:
    async with deployment("2e1b", hedge_after="0.02") as d:
        for encoder in d.encoders:
            encoder.always = Fault(Kind.HANG)
        asking = asyncio.create_task(d.post(chat(*images(1))))
        for encoder in d.encoders:
            await encoder.until(lambda encoder=encoder: encoder.running == 1)
        asking.cancel()
        for encoder in d.encoders:
            await encoder.until(lambda encoder=encoder: encoder.aborted == 1)


# ---- announced embeddings


async def test_prefill_and_decode_are_asked_while_items_are_still_encoded() -> None:
    async with deployment("2e1p1d") as d:
        for encoder in d.encoders:
            encoder.computing = asyncio.Event()
        (prefill,), (decode,) = d.prefills, d.decodes
        prefill.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(*images(2))))
        await prefill.until(lambda: prefill.running == 1)
        assert [encoder.running for encoder in d.encoders] == [1, 1], "nobody has computed anything yet"
        assert decode.running == 1
        assert len(prefill.calls[0].body["ec_transfer_params"]) == 2
        assert d.proxy.balancer.ledger.leases(role=Role.ENCODE) == 2
        for encoder in d.encoders:
            assert encoder.computing is not None
            encoder.computing.set()
        await d.encoders[0].until(lambda: not d.encoders[0].running)
        await d.encoders[1].until(lambda: not d.encoders[1].running)
        prefill.gate.set()
        answer = await asking
        assert (answer.status, prefill.running) == (200, 0)
        assert [len(engine.calls) for engine in d.engines] == [1, 1, 1, 1]
        assert "encode;dur=" in answer.headers["Server-Timing"]


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("kind", [Kind.ERROR_EVENT, Kind.TRUNCATED])
async def test_a_promise_that_is_broken_costs_one_attempt_and_the_next_waits_for_its_embeddings(
    kind: Kind, handoff: str
) -> None:
    async with deployment("1e1p1d", handoff) as d:
        (encoder,), (prefill,) = d.encoders, d.prefills
        encoder.computing, encoder.breaks = asyncio.Event(), Fault(kind, status=500, error="the model is ill")
        prefill.always = Fault(Kind.HANG)
        asking = asyncio.create_task(d.post(chat(*images(1)), x_request_id="me"))
        await prefill.until(lambda: prefill.running == 1)
        prefill.always = None
        encoder.computing.set()
        answer = await asking
        assert answer.status == 200, answer.body
        assert [call.id for call in prefill.calls] == ["me", "me-2"]
        assert prefill.aborted == 1
        assert [call.body.get("announce") for call in encoder.calls] == [True, None]


async def test_what_breaks_while_others_are_not_announced_yet_is_tried_again_too() -> None:
    async with deployment("2e1b") as d:
        bad, slow = d.encoders
        bad.computing, bad.breaks = asyncio.Event(), Fault(Kind.ERROR_EVENT, status=500, error="ill")
        slow.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(*images(2))))
        await slow.until(lambda: slow.running == 1)
        await bad.until(lambda: bad.running == 1)
        bad.computing.set()
        await slow.until(lambda: slow.aborted == 1)
        slow.gate.set()
        assert (await asking).status == 200
        assert len(d.combined[0].calls) == 1


async def test_a_prefill_that_fails_meanwhile_goes_elsewhere_with_embeddings_made_anew() -> None:
    async with deployment("1e2p1d", "pull") as d:
        (encoder,), (ill, well) = d.encoders, d.prefills
        encoder.computing = asyncio.Event()
        ill.always = Fault(Kind.STATUS, status=500, error="ill")
        well.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat(*images(1)))) for _ in range(2)]  # one of them at each
        await well.until(lambda: well.running == 2)
        assert encoder.aborted == 1, "nobody waits for what it computed for the ill one"
        encoder.computing.set()
        well.gate.set()
        assert [(await one).status for one in asking] == [200, 200]
        assert [call.body.get("announce") for call in encoder.calls] == [True, True, None]


async def test_a_client_that_leaves_meanwhile_ends_all_of_it() -> None:
    async with deployment("1e1b") as d:
        (encoder,), (engine,) = d.encoders, d.combined
        encoder.computing, engine.gate = asyncio.Event(), asyncio.Event()
        asking = asyncio.create_task(d.post(chat(*images(1))))
        await engine.until(lambda: engine.running == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await engine.until(lambda: engine.aborted == 1)
        await encoder.until(lambda: encoder.aborted == 1)


async def test_nothing_is_announced_where_slow_encoders_are_hedged() -> None:
    async with deployment("2e1b", hedge_after="30") as d:
        assert (await d.post(chat(*images(1)))).status == 200
        assert [call.body.get("announce") for encoder in d.encoders for call in encoder.calls] == [None]
