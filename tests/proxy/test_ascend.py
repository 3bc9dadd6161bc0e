"""A proxy before scripted vLLM-Ascend engines, over real sockets: what works, and what each failure becomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from tests.fakes.ascend import THREADS, World
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import PIECES

TEXT = "".join(PIECES)
COMPLETIONS = "/v1/completions"


@asynccontextmanager
async def fleet(topology: str = "1p1d", handoff: str = "push", **settings: Any) -> AsyncIterator[Deployment]:
    make = World().engines(prefill_first=handoff == "pull")
    async with deployment(topology, handoff, make, dialect="ascend", **settings) as d:
        for engine in d.engines:
            engine.calls.clear()  # warm-up
        yield d
        assert not any(decode.wrong for decode in d.decodes), "the KV of other tokens"


def texts(answer: Answer) -> dict[int, str]:
    """What each choice said."""
    said: dict[int, str] = {}
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.body.endswith(b"data: [DONE]\n\n")
        events = [orjson.loads(line[6:]) for line in answer.body.split(b"\n\n")[:-2]]
        pieces = [
            (choice["index"], choice.get("text") or choice.get("delta", {}).get("content") or "")
            for event in events
            for choice in event["choices"]
        ]
    else:
        pieces = [
            (choice["index"], choice["text"] if "text" in choice else choice["message"]["content"])
            for choice in answer.json["choices"]
        ]
    for index, piece in pieces:
        said[index] = said.get(index, "") + piece
    return said


@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_kind_of_request_is_served(handoff: str, stream: bool) -> None:
    async with fleet("1e1p1d", handoff) as d:
        image_url = {"type": "image_url", "image_url": {"url": "https://images.example/cat.png"}}
        requests = [
            (chat(stream=stream), "/v1/chat/completions"),
            (chat(part(image()), image_url, stream=stream), "/v1/chat/completions"),
            ({"model": "tiny", "prompt": "hello", "max_tokens": 9, "stream": stream}, COMPLETIONS),
        ]
        for body, path in requests:
            answer = await d.post(body, path)
            assert (answer.status, texts(answer)) == (200, {0: TEXT})
        assert [len(engine.calls) for engine in d.engines] == [1, 3, 3], "text passes the encoder by"
        assert d.prefills[0].encoded == 0, "every embedding was found"
        assert not d.decodes[0].blocks


@pytest.mark.parametrize(
    ("body", "path", "count"),
    [
        (chat(n=3), "/v1/chat/completions", 3),
        (chat(n=3, stream=True), "/v1/chat/completions", 3),
        ({"model": "tiny", "prompt": ["a", "b"], "max_tokens": 9}, COMPLETIONS, 2),
        ({"model": "tiny", "prompt": ["a", "b"], "n": 2, "stream": True, "max_tokens": 9}, COMPLETIONS, 4),
        ({"model": "tiny", "prompt": [str(n) for n in range(THREADS + 9)], "max_tokens": 9}, COMPLETIONS, THREADS + 9),
    ],
)
async def test_each_sequence_is_prefilled_into_its_own_blocks(body: dict[str, Any], path: str, count: int) -> None:
    async with fleet() as d:
        answer = await d.post(body, path)
        assert texts(answer) == dict.fromkeys(range(count), TEXT)
        prefill, decode = d.prefills[0], d.decodes[0]
        asked = [call.body["kv_transfer_params"]["request_id"] for call in prefill.calls]
        assert len(set(asked)) == len(asked) == count and len(decode.calls) == 1
        await decode.until(lambda: decode.statuses == [200] * count)
        assert not decode.blocks


async def test_no_more_wait_at_a_decode_engine_than_it_has_threads() -> None:
    async with fleet() as d:
        prefill, decode = d.prefills[0], d.decodes[0]
        prefill.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat(n=1 + number % 3))) for number in range(THREADS)]
        await prefill.until(lambda: prefill.running >= THREADS - 2)
        prefill.gate.set()
        for answer in asyncio.as_completed(asking):
            assert (await answer).status == 200
        assert THREADS - 2 <= decode.most_wanted <= THREADS
        assert len(prefill.calls) == sum(1 + number % 3 for number in range(THREADS))


# ---- failures


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault(Kind.STATUS, status=500), 500),
        (Fault(Kind.RESET), 502),
        (Fault(Kind.GARBAGE), 502),
        (Fault(Kind.HANG), 504),
        (Fault(Kind.ERROR_EVENT, status=500), 500),
        (Fault(Kind.STATUS, status=400), 400),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("body", [chat(), chat(stream=True), chat(n=2, stream=True)], ids=["whole", "stream", "n"])
async def test_prefills_failure_ends_decode_which_would_wait_for_ever(
    body: dict[str, Any], fault: Fault, status: int
) -> None:
    async with fleet(prefill_timeout=0.3) as d:
        d.prefills[0].fail(fault)
        answer = await d.post(body)
        assert (answer.status, answer.error["stage"]) == (status, "prefill")
        await d.decodes[0].until(lambda: d.decodes[0].aborted == 1)


async def test_one_choice_without_its_prefill_ends_a_stream_that_has_begun() -> None:
    async with fleet(stream_idle_timeout=9.0) as d:
        d.prefills[0].fail(Fault(Kind.SLOW), Fault(Kind.STATUS, status=500))
        answer = await d.post(chat(n=2, stream=True))
        assert (answer.status, answer.error["stage"]) == (500, "prefill")


async def test_another_prefill_engine_is_asked_under_another_id() -> None:
    async with fleet("2p2d") as d:
        for prefill in d.prefills:
            prefill.faults = d.prefills[0].faults
        d.prefills[0].fail(Fault(Kind.RESET))
        answer = await d.post(chat(), x_request_id="me")
        assert (answer.status, texts(answer)) == (200, {0: TEXT})
        ids = [call.body["kv_transfer_params"]["request_id"] for prefill in d.prefills for call in prefill.calls]
        assert sorted(ids) == ["chatcmpl-me", "chatcmpl-me-2"]


@pytest.mark.parametrize("body", [chat(), chat(n=3, stream=True)], ids=["one", "n"])
async def test_decode_gets_its_blocks_back_from_a_client_that_left(body: dict[str, Any]) -> None:
    async with fleet() as d:
        prefill, decode = d.prefills[0], d.decodes[0]
        prefill.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(body))
        await prefill.until(lambda: prefill.running == body.get("n", 1))
        asking.cancel()
        await asyncio.wait([asking])
        await decode.until(lambda: decode.aborted == 1)
        assert decode.blocks and not prefill.aborted, "only prefill's message frees them"
        prefill.gate.set()
        await decode.until(lambda: not decode.blocks)


async def test_a_proxy_that_stops_waits_for_no_prefill_whose_client_left() -> None:
    async with fleet() as d:
        prefill = d.prefills[0]
        prefill.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat()))
        await prefill.until(lambda: prefill.running == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await d.decodes[0].until(lambda: d.decodes[0].aborted == 1)
        assert len(d.proxy.metaserver.owed) == 1
        await d.proxy.metaserver.owed.stop()
        await prefill.until(lambda: prefill.aborted == 1)


async def test_a_lost_last_message_is_told_by_the_deadline() -> None:
    async with fleet(first_token_timeout=0.3) as d:
        d.prefills[0].silent = True
        answer = await d.post(chat(stream=True))
        assert (answer.status, answer.error["stage"]) == (504, "decode")
        await d.decodes[0].until(lambda: d.decodes[0].aborted == 1)


@pytest.mark.parametrize(
    ("fault", "status"), [(Fault(Kind.STATUS, status=500), 500), (Fault(Kind.RESET), 502), (Fault(Kind.GARBAGE), 502)]
)
async def test_an_encoders_failure_is_told_and_nothing_stays_charged(fault: Fault, status: int) -> None:
    async with fleet("1e1p1d", max_attempts=1) as d:
        d.encoders[0].fail(fault)
        answer = await d.post(chat(part(image())))
        assert (answer.status, answer.error["stage"]) == (status, "encode")
        assert not d.decodes[0].calls


async def test_without_encoders_prefill_encodes() -> None:
    async with fleet("1p1d") as d:
        answer = await d.post(chat(part(image())))
        assert texts(answer) == {0: TEXT}
        assert d.prefills[0].encoded == 1
    async with fleet("1b") as d:
        assert texts(await d.post(chat(part(image())))) == {0: TEXT}


async def test_a_client_cannot_speak_to_the_connector() -> None:
    async with fleet() as d:
        answer = await d.post(chat(kv_transfer_params={"do_remote_decode": True}))
        assert answer.status == 400 and not d.prefills[0].calls
        stranger = d.decodes[0].descriptor("chatcmpl-nobody")
        assert (await d.post(stranger, "/v1/metaserver")).status == 404
        assert not d.prefills[0].calls


# ---- sequences that decode gives up


GIVEN_UP = [(chat, "/v1/chat/completions"), (lambda **f: {"model": "tiny", "prompt": "hello"} | f, COMPLETIONS)]


@pytest.mark.parametrize(("make", "path"), GIVEN_UP, ids=["chat", "completions"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
@pytest.mark.parametrize("after", [(1,), (2, 1), (1, 1, 1), (0, 2), (3, 0, 0)], ids=str)
async def test_a_stream_given_up_goes_on_unseen(make: Any, path: str, handoff: str, after: tuple[int, ...]) -> None:
    body = make(stream=True, stream_options={"include_usage": True}, max_tokens=9)
    async with fleet("1p2d", handoff, max_attempts=3) as d:
        wanted = await d.post(body, path, x_request_id="me")
        assert wanted.body.endswith(b"[DONE]\n\n")
        for engine in d.engines:
            engine.calls.clear()
        for decode in d.decodes:
            decode.give_up = d.decodes[0].give_up
        d.decodes[0].give_up.extend(after)
        answer = await d.post(body, path, x_request_id="me")
        first = "me-2" if after[0] == 0 else "me"  # of one that said nothing, nothing was sent
        assert answer.body.replace(first.encode(), b"me") == wanted.body, "not a byte differs"
        assert len(d.prefills[0].calls) == 1 + len(after)
        assert sum(len(decode.calls) for decode in d.decodes) == 1 + len(after)
        limits = [call.body["max_tokens"] for decode in d.decodes for call in decode.calls]
        assert min(limits) == 9 - sum(after)


@pytest.mark.parametrize(("make", "path"), GIVEN_UP, ids=["chat", "completions"])
async def test_an_unstreamed_answer_given_up_is_put_together(make: Any, path: str) -> None:
    async with fleet() as d:
        wanted = await d.post(make(max_tokens=9), path, x_request_id="me")
        d.decodes[0].give_up.extend([2, 1])
        answer = await d.post(make(max_tokens=9), path, x_request_id="me")
        assert answer.json == wanted.json


async def test_media_go_along_when_a_sequence_goes_on() -> None:
    async with fleet("1e1p1d") as d:
        d.decodes[0].give_up.append(2)
        assert texts(await d.post(chat(part(image()), stream=True))) == {0: TEXT}
        contents = [call.body["messages"][0]["content"] for call in d.decodes[0].calls + d.prefills[0].calls]
        assert contents == [contents[0]] * 4
        assert len(d.encoders[0].calls) == 1 and d.prefills[0].encoded == 0


async def test_more_is_said_than_there_are_attempts_as_long_as_something_is() -> None:
    async with fleet(max_attempts=1) as d:
        d.decodes[0].give_up.extend([1, 1, 1])
        assert texts(await d.post(chat(stream=True))) == {0: TEXT}
        d.decodes[0].give_up.extend([0, 0])
        answer = await d.post(chat(stream=True))
        assert (answer.status, answer.error["code"]) == (503, "given_up")
        d.decodes[0].give_up.clear()


@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"tools": [{"type": "function"}]}, {"temperature": 1, "seed": 3}], ids=str
)
async def test_what_cannot_go_on_exactly_begins_anew_or_is_told(fields: dict[str, Any]) -> None:
    async with fleet() as d:
        d.decodes[0].give_up.append(2)
        answer = await d.post(chat(**fields))
        assert texts(answer) == dict.fromkeys(range(fields.get("n", 1)), TEXT), "nothing had been sent"
        d.decodes[0].give_up.append(2)
        answer = await d.post(chat(stream=True, **fields))
        assert answer.status == 200 and b"[DONE]" not in answer.body
        error = orjson.loads(answer.body.rstrip().rpartition(b"data: ")[2])["error"]
        assert (error["code"], error["stage"], error["retryable"]) == ("given_up", "decode", True)


async def test_an_engine_that_does_not_read_tokens_is_found_out() -> None:
    async with fleet() as d:
        d.prefills[0].reads_tokens = d.decodes[0].reads_tokens = False
        d.decodes[0].give_up.append(2)
        answer = await d.post(chat(stream=True))
        assert answer.body.count(PIECES[0].encode()) == 1, "nothing is said twice"
        error = orjson.loads(answer.body.rstrip().rpartition(b"data: ")[2])["error"]
        assert (error["code"], error["stage"]) == ("engine_broken", "decode")
