"""One request over a real socket: what a served answer is, and what is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.load.asking import CHAT, Broken, Outcome, ask, first_model
from bench.load.questions import Question

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
END = b"data: [DONE]\n\n"


@asynccontextmanager
async def served(answer: Answer, path: str = CHAT) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    app = web.Application()
    app.router.add_route("*", path, answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield session, str(server.make_url("")).rstrip("/")


def streamed(*pieces: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-triptych-route": "P-D; x"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        return response

    return answer


async def outcome_of(answer: Answer) -> Outcome:
    async with served(answer) as (session, url):
        return await ask(session, url + CHAT, Question("text", b"{}"), time.monotonic())


async def test_a_stream_is_measured_from_when_it_was_due() -> None:
    async with served(streamed(TOKEN, TOKEN, USAGE, END)) as (session, url):
        late = await ask(session, url + CHAT, Question("image", b"{}"), time.monotonic() - 5)
    assert not late.error
    assert late.first is not None and 5 < late.first <= late.ended
    assert (late.kind, late.prompt_tokens, late.output_tokens, len(late.pauses)) == ("image", 3, 2, 1)
    assert late.pace == late.ended - late.first
    assert late.route.startswith("P-D")


async def test_events_are_counted_where_no_usage_is_told() -> None:
    found = await outcome_of(streamed(TOKEN, b'data: {"choices":[{"delta":{}}]}\n\n', TOKEN, TOKEN, END))
    assert (found.error, found.output_tokens) == ("", 3)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([TOKEN], "the stream ended without [DONE]"),
        ([], "the stream ended without [DONE]"),
        ([TOKEN, b'data: {"error":{"message":"decode died"}}\n\n'], "decode died"),
        ([b"data: nonsense\n\n"], "not JSON"),
    ],
)
async def test_a_status_of_200_is_not_enough(pieces: list[bytes], says: str) -> None:
    assert says in (await outcome_of(streamed(*pieces))).error


async def test_refusals_say_why() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too\nmuch"}}, status=429)

    assert (await outcome_of(answer)).error == "429 too much"


async def test_the_same_words_have_the_same_digest_however_they_are_cut() -> None:
    other = TOKEN.replace(b'"a"', b'"b"')
    both = TOKEN.replace(b'"a"', b'"ab"')
    found = [(await outcome_of(streamed(*events, END))).digest for events in ([TOKEN, other], [both], [other, TOKEN])]
    assert found[0] == found[1] != found[2]


async def test_a_whole_answer_has_its_usage() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9}})

    found = await outcome_of(answer)
    assert (found.error, found.output_tokens, found.first, found.pace) == ("", 9, None, None)


async def test_nobody_there_and_no_end_are_told() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(10)
        raise AssertionError

    async with served(answer) as (_, url), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.1)) as session:
        slow = await ask(session, url + CHAT, Question("text", b"{}"), time.monotonic())
    assert slow.error == "no end within --timeout"
    async with aiohttp.ClientSession() as session:
        gone = await ask(session, url + CHAT, Question("text", b"{}"), time.monotonic())
    assert gone.error.startswith("ClientConnectorError")


async def test_the_first_model_is_asked_for() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(models)

    async with served(answer, "/v1/models") as (session, url):
        models: object = {"data": [{"id": "a"}, {"id": "b"}]}
        assert await first_model(session, url) == "a"
        models = {"data": []}
        with pytest.raises(Broken, match="say --model"):
            await first_model(session, url)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(Broken, match="cannot be reached"):
            await first_model(session, url)
