"""Every path, order, failure and cancellation over real sockets: what engines were sent, what the client got.

Leaving a deployment checks that the ledger is empty, no callback waits and no engine is left in a call.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
import pytest
from blake3 import blake3

from proxy.sse import Splitter
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import PIECES, Engine

TEXT = "".join(PIECES)
PATHS = [
    ("1b", "push", False, "PD"),
    ("1e1b", "push", True, "E-PD"),
    ("1p1d", "push", False, "P-D"),
    ("1p1d", "pull", False, "P-D"),
    ("1e1p1d", "push", True, "E-P-D"),
    ("1e1p1d", "pull", True, "E-P-D"),
]


def events(body: bytes) -> list[bytes]:
    splitter = Splitter()
    found = [event.data for event in splitter.feed(body)]
    assert splitter.rest == b"", "only whole events reach a client"
    return found


def text_of(body: bytes) -> str:
    """What a client reads out of a stream."""
    chunks = [orjson.loads(data) for data in events(body) if data != b"[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if "choices" in chunk)


# ---- served whole


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("topology", "handoff", "media", "path"), PATHS)
async def test_every_path_serves(topology: str, handoff: str, media: bool, path: str, stream: bool) -> None:
    async with deployment(topology, handoff) as d:
        parts = [part(image())] if media else []
        answer = await d.post(chat(*parts, stream=stream), x_request_id="me-1")
        assert answer.status == 200, answer.body
        assert answer.headers["x-request-id"] == "me-1"
        assert answer.route.startswith(f"{path}; ")
        if stream:
            last = (d.decodes or d.combined)[0]
            assert answer.body == last.streamed
            assert text_of(answer.body) == TEXT
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        else:
            assert answer.json["choices"][0]["message"]["content"] == TEXT
        assert all(len(engine.calls) == 1 for engine in d.engines)
        assert {call.id for engine in d.engines for call in engine.calls} <= {"me-1", "me-1:0"}


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stream", [False, True])
async def test_completions_take_the_same_way(handoff: str, stream: bool) -> None:
    async with deployment("1p1d", handoff) as d:
        answer = await d.post({"model": "tiny", "prompt": "hi", "stream": stream}, "/v1/completions")
        assert answer.status == 200, answer.body
        assert [call.path for engine in d.engines for call in engine.calls] == ["/v1/completions"] * 2
        if not stream:
            assert answer.json["choices"][0]["text"] == TEXT


async def test_text_never_touches_an_encoder() -> None:
    async with deployment("1e1p1d") as d:
        answer = await d.post(chat())
        assert answer.status == 200
        assert not d.encoders[0].calls
        assert answer.route == (
            f"P-D; prefill={d.prefills[0].netloc}; decode={d.decodes[0].netloc}; "
            "reason=text only, prefill and decode apart"
        )


async def test_media_leave_the_body_of_prefill_and_decode() -> None:
    data = image()
    mm_hash = blake3(data).hexdigest()
    async with deployment("1e1p1d", "push") as d:
        await d.post(chat(part(data), unknown={"z": 1, "a": 2}))
        prefill, decode = d.prefills[0].calls[0].body, d.decodes[0].calls[0].body
        for body in (prefill, decode):
            embeds = body["messages"][0]["content"][1]
            assert embeds["type"] == "image_embeds"
            assert embeds["uuid"] == mm_hash
            assert embeds["image_embeds"]["image_grid_thw"][2] == 8
            assert body["unknown"] == {"z": 1, "a": 2}
        assert prefill["ec_transfer_params"][mm_hash]["where"] == {"at": d.encoders[0].netloc}
        assert "ec_transfer_params" not in decode
        assert prefill["kv_transfer_params"]["offer"] == {"ticket": d.decodes[0].calls[0].id}
        assert (prefill["max_tokens"], prefill["min_tokens"], prefill["stream"]) == (1, 1, False)
        assert decode["kv_transfer_params"]["metaserver"] == f"{d.url}/v1/metaserver"


async def test_pull_passes_the_parameters_on_verbatim() -> None:
    async with deployment("1p1d", "pull") as d:
        await d.post(chat(max_tokens=9, stream=True, stream_options={"include_usage": True}))
        prefill, decode = d.prefills[0].calls[0].body, d.decodes[0].calls[0].body
        assert decode["kv_transfer_params"]["where"] == d.prefills[0].netloc
        assert (decode["max_tokens"], decode["stream_options"]) == (9, {"include_usage": True})
        assert (prefill["max_tokens"], prefill["stream"]) == (1, False)
        assert "stream_options" not in prefill


async def test_the_items_of_a_request_fan_out_at_once() -> None:
    images = [image(56, 56, color=(i, 0, 0)) for i in range(4)]
    async with deployment("2e1p1d") as d:
        gate = asyncio.Event()
        for encoder in d.encoders:
            encoder.gate = gate
        asking = asyncio.create_task(d.post(chat(*map(part, images), part(images[0]))))
        for encoder in d.encoders:
            await encoder.until(lambda encoder=encoder: encoder.running == 1)
        assert d.proxy.balancer.ledger.leases() == 6, "four items, prefill, decode"
        gate.set()
        answer = await asking
        assert answer.status == 200, answer.body
        sent = [len(e.calls[0].body["messages"][0]["content"]) for e in d.encoders]
        assert sent == [2, 2], "the same image twice is sent once"
        embeds = d.prefills[0].calls[0].body["messages"][0]["content"][1:]
        assert [e["uuid"] for e in embeds] == [blake3(data).hexdigest() for data in (*images, images[0])]
        ids = sorted(e.calls[0].id.rpartition(":")[2] for e in d.encoders)
        assert ids == ["0", "1"]


async def test_durations_known_by_then_are_in_server_timing() -> None:
    async with deployment("1e1p1d", "pull") as d:
        answer = await d.post(chat(part(image()), stream=True))
        timing = answer.headers["Server-Timing"]
        names = [entry.partition(";dur=")[0] for entry in timing.split(", ")]
        assert names == ["encode", "prefill", "ttft"]
        assert all(float(entry.partition("=")[2]) >= 0 for entry in timing.split(", "))


async def test_decode_that_needs_no_prefill_is_served_without() -> None:
    async with deployment("1p1d", "push") as d:
        d.decodes[0].asks = False
        assert (await d.post(chat())).status == 200
        assert not d.prefills[0].calls


async def test_two_requests_with_one_id_are_told_apart() -> None:
    async with deployment("1p1d", "push") as d:
        gate = d.prefills[0].gate = asyncio.Event()
        one = asyncio.create_task(d.post(chat(), x_request_id="same"))
        two = asyncio.create_task(d.post(chat(), x_request_id="same"))
        await d.prefills[0].until(lambda: d.prefills[0].running == 2)
        gate.set()
        answers = [await one, await two]
        assert [a.status for a in answers] == [200, 200]
        assert [a.headers["x-request-id"] for a in answers] == ["same", "same"]
        assert len({call.id for call in d.decodes[0].calls}) == 2


async def test_a_large_body_goes_whole_to_its_encoder() -> None:
    data = image() + bytes(3 << 20)
    async with deployment("1e1b") as d:
        assert (await d.post(chat(part(data)))).status == 200
        assert d.encoders[0].calls[0].body["messages"][0]["content"][0]["image_url"] == part(data)["image_url"]


async def test_slow_engines_change_nothing() -> None:
    async with deployment("1e1p1d", "pull") as d:
        for engine in d.engines:
            engine.always = Fault(Kind.SLOW)
        streamed = await d.post(chat(part(image()), stream=True))
        assert streamed.body == d.decodes[0].streamed
        assert (await d.post(chat(part(image())))).json["choices"][0]["message"]["content"] == TEXT


# ---- failures before the first byte: an honest status, whatever the client asked for

# Short where a test waits for them to pass; everywhere else nobody's slowness may fail a test.
TIMEOUTS = {"encode_timeout": 0.4, "prefill_timeout": 0.4, "first_token_timeout": 0.8, "answer_timeout": 0.8}

FAILURES = [
    pytest.param(Fault(Kind.RESET), 502, "engine_broken", id="reset"),
    pytest.param(Fault(Kind.HANG), 504, "stage_timeout", id="hang"),
    pytest.param(Fault(Kind.STATUS, status=500), 500, 500, id="500"),
    pytest.param(Fault(Kind.STATUS, status=429), 429, 429, id="429"),
    pytest.param(Fault(Kind.STATUS, status=400), 400, 400, id="400"),
    pytest.param(Fault(Kind.GARBAGE), 502, "engine_broken", id="garbage"),
    pytest.param(Fault(Kind.TRUNCATED), 502, "engine_broken", id="truncated"),
    pytest.param(Fault(Kind.ERROR_EVENT, error="boom"), 500, 500, id="error-in-200"),
]


def engine_of(d: Deployment, stage: str) -> Engine:
    return {"encode": d.encoders, "prefill": d.prefills, "decode": d.decodes}[stage][0]


def check_error(answer: Answer, status: int, code: Any, stage: str, *, attempts: int = 1) -> None:
    error = answer.error
    assert (answer.status, error["stage"], error["attempts"]) == (status, stage, attempts), answer.body
    assert error["code"] == code
    assert error["retryable"] is (status >= 500 or status == 429)
    assert error["message"] and set(error) == {
        "message",
        "type",
        "param",
        "code",
        "stage",
        "retryable",
        "attempts",
    }
    assert answer.route.startswith("E-P-D; encode="), "the receipt comes with errors too"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
@pytest.mark.parametrize(("fault", "status", "code"), FAILURES)
async def test_a_failing_stage_is_told(
    fault: Fault, status: int, code: Any, stage: str, handoff: str, stream: bool
) -> None:
    hangs = fault.kind is Kind.HANG
    async with deployment("1e1p1d", handoff, **(TIMEOUTS if hangs else {})) as d:
        engine_of(d, stage).fail(fault)
        answer = await d.post(chat(part(image()), stream=stream))
        check_error(answer, status, code, stage)
        await d.settle()
        assert hangs or (await d.post(chat(part(image()), stream=stream))).status == 200, "the next request works"


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
async def test_a_dead_engine_is_told(stage: str, handoff: str) -> None:
    async with deployment("1e1p1d", handoff) as d:
        engine = engine_of(d, stage)
        await engine.stop()
        answer = await d.post(chat(part(image())))
        check_error(answer, 502, "engine_unreachable", stage)
        assert "Connection refused" in answer.error["message"]
        assert engine.netloc in d.down(), "noticed by that request, before any probe"
        refused = await d.post(chat(part(image())))
        assert (refused.status, refused.error["code"], refused.headers["Retry-After"]) == (503, "no_instance", "1")
        await engine.start()
        await d.proxy.health.tick()
        assert (await d.post(chat(part(image())))).status == 200


async def test_an_engines_own_words_reach_the_client() -> None:
    said = {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "context_length"}
    async with deployment("1p1d", "pull") as d:
        d.prefills[0].fail(Fault(Kind.STATUS, status=422, error=said))
        answer = await d.post(chat())
        assert answer.status == 422
        assert answer.error == said | {"stage": "prefill", "retryable": False, "attempts": 1}
        assert not d.decodes[0].calls


async def test_a_failed_prefill_is_told_to_decode_as_well() -> None:
    async with deployment("1p1d", "push") as d:
        d.prefills[0].fail(Fault(Kind.STATUS, status=503, error="busy"))
        answer = await d.post(chat())
        assert (answer.status, answer.error["stage"], answer.error["message"]) == (503, "prefill", "busy")


async def test_a_broken_image_is_named_as_the_client_knows_it() -> None:
    said = {"message": "no image", "param": "messages[0].content[0]", "code": "invalid_image"}
    async with deployment("1e1b") as d:
        d.encoders[0].fail(Fault(Kind.STATUS, status=400, error=said))
        body = chat(part(image()))
        body["messages"].insert(0, {"role": "system", "content": "be kind"})
        answer = await d.post(body)
        assert (answer.status, answer.error["param"], answer.error["stage"]) == (
            400,
            "messages[1].content[1]",
            "encode",
        )


async def test_the_first_refused_item_cancels_the_others() -> None:
    async with deployment("2e1p1d") as d:
        one, other = d.encoders
        other.always = Fault(Kind.HANG)
        gate = one.gate = asyncio.Event()
        one.fail(Fault(Kind.STATUS, status=400))
        asking = asyncio.create_task(d.post(chat(part(image()), part(image(9, 9)))))
        await other.until(lambda: other.running == 1)
        gate.set()
        assert (await asking).status == 400
        await other.until(lambda: other.aborted == 1)
        assert not d.prefills[0].calls and not d.decodes[0].calls


async def test_a_lost_embedding_is_encoded_again_once() -> None:
    gone = Fault(Kind.STATUS, status=502, error={"message": "gone", "code": "embedding_gone", "stage": "encode"})
    async with deployment("1e1p1d", "push") as d:
        d.prefills[0].fail(gone)
        answer = await d.post(chat(part(image())), x_request_id="me")
        assert answer.status == 200, answer.body
        assert [len(e.calls) for e in d.engines] == [2, 2, 2]
        assert d.decodes[0].calls[1].id == "me-2", "a new id, as decode may still hold the first"
        d.prefills[0].fail(gone, gone, gone)
        answer = await d.post(chat(part(image())))
        assert (answer.status, answer.error["code"], answer.error["attempts"]) == (502, "embedding_gone", 3)


async def test_a_prompt_in_kv_is_no_load_of_who_prefilled_it() -> None:
    async with deployment("1p1d", "pull") as d:
        gate = d.decodes[0].gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat()))
        await d.decodes[0].until(lambda: d.decodes[0].running == 1)
        ledger = d.proxy.balancer.ledger
        assert (ledger.load(d.prefills[0].url), ledger.load(d.decodes[0].url) > 0) == (0, True)
        gate.set()
        assert (await asking).status == 200


async def test_the_prefill_of_a_stream_may_take_longer_than_its_first_token() -> None:
    async with deployment("1p1d", "push", first_token_timeout=1.0) as d:
        gate = d.prefills[0].gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(stream=True)))
        await d.prefills[0].until(lambda: d.prefills[0].running == 1)
        await asyncio.sleep(1.2)
        gate.set()
        assert (await asking).status == 200


# ---- failures after the first byte: an error event, and no [DONE]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(Kind.TRUNCATED, after=2), "engine_broken"),
        (Fault(Kind.NO_DONE, after=99), "engine_broken"),
        (Fault(Kind.STALL, after=2), "stage_timeout"),
        (Fault(Kind.ERROR_EVENT, after=2, error="boom"), 500),
    ],
    ids=["cut", "no-done", "stall", "error-event"],
)
@pytest.mark.parametrize("topology", ["1b", "1p1d"])
async def test_a_stream_that_breaks_ends_with_an_error_event(topology: str, fault: Fault, code: Any) -> None:
    async with deployment(topology, stream_idle_timeout=0.4 if fault.kind is Kind.STALL else 60.0) as d:
        (d.decodes or d.combined)[0].fail(fault)
        answer = await d.post(chat(stream=True))
        assert answer.status == 200
        assert b"[DONE]" not in answer.body
        assert TEXT.startswith(text_of(answer.body)) and text_of(answer.body).startswith("Hello")
        *before, last = events(answer.body)
        error = orjson.loads(last)["error"]
        assert (error["code"], error["stage"], error["retryable"], error["attempts"]) == (code, "decode", True, 1)
        assert not any(b'"error"' in event for event in before)


@pytest.mark.parametrize("kind", [Kind.TRUNCATED, Kind.ERROR_EVENT, Kind.STALL])
async def test_a_stream_that_breaks_before_content_is_no_200(kind: Kind) -> None:
    async with deployment("1b", first_token_timeout=0.4 if kind is Kind.STALL else 60.0) as d:
        d.combined[0].fail(Fault(kind, after=0, error="boom"))
        answer = await d.post(chat(stream=True))
        assert answer.status >= 500 and answer.error["stage"] == "decode"


# ---- the client leaves


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
async def test_a_client_that_leaves_ends_every_leg(stage: str, handoff: str, stream: bool) -> None:
    async with deployment("1e1p1d", handoff) as d:
        engine = engine_of(d, stage)
        engine.fail(Fault(Kind.HANG))
        async with aiohttp.ClientSession() as http:
            asking = asyncio.create_task(
                http.post(f"{d.url}/v1/chat/completions", json=chat(part(image()), stream=stream))
            )
            await engine.until(lambda: engine.running == 1)
            asking.cancel()
            await asyncio.wait([asking])
            await engine.until(lambda: engine.aborted == 1 and engine.running == 0)
        await d.settle()
        if stage == "prefill" and handoff == "push":
            await d.decodes[0].until(lambda: d.decodes[0].aborted == 1)
        assert (await d.post(chat(part(image())))).status == 200


async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it() -> None:
    async with deployment("1p1d") as d:
        decode = d.decodes[0]
        decode.fail(Fault(Kind.STALL, after=2))
        async with aiohttp.ClientSession() as http:
            response = await http.post(f"{d.url}/v1/chat/completions", json=chat(stream=True))
            assert response.status == 200
            assert b"Hel" in await response.content.readany()
            response.close()
            await decode.until(lambda: decode.aborted == 1)
        await d.settle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_slow_client_is_not_the_engines_fault(stream: bool) -> None:
    async with deployment("1b", answer_timeout=3.0, stream_idle_timeout=2.0) as d:
        d.combined[0].pieces = ("x" * (1 << 20),) * 16  # more than the sockets between them hold
        async with d.http.post(f"{d.url}/v1/chat/completions", json=chat(stream=stream)) as response:
            await response.content.readany()
            await asyncio.sleep(4.0)
            rest = await response.read()
        assert b"stage_timeout" not in rest and rest.count(b"x") > 15 << 20


async def test_many_at_once_leave_nothing_behind() -> None:
    async with deployment("2e2p2d") as d:
        d.encoders[0].always = Fault(Kind.SLOW)
        for n, engine in enumerate((*d.prefills, *d.decodes)):
            engine.fail(*(Fault(Kind.RESET) for _ in range(n)), Fault(Kind.STATUS, status=500), Fault(Kind.GARBAGE))
        bodies = [chat(*[part(image(8, 8 + i))] * (i % 3), stream=bool(i % 2)) for i in range(32)]
        answers = await asyncio.gather(*map(d.post, bodies))
        good = [a for a in answers if a.status == 200]
        assert len(good) >= 18
        assert all(a.json["error"]["stage"] for a in answers if a.status != 200)
        await d.settle()
        for answer in good:
            whole = answer.headers["Content-Type"] == "application/json"
            text = answer.json["choices"][0]["message"]["content"] if whole else text_of(answer.body)
            assert text == TEXT
