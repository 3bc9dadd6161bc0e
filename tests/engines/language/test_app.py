"""One combined engine in this process, with a cache for two or three sequences: routes, streams, errors, preemption."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from bench.soak import busy_parts
from engines.language.app import LanguageApp
from engines.language.build import build
from engines.serve import running
from engines.settings import LanguageSettings
from tests.support.checkpoints import checkpoint
from tests.support.cluster import Answer, Client
from tests.support.reference import reference
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAMILY = "qwen2_5_vl"
BLOCKS = 14
MESSAGES = [{"role": "user", "content": "Say something about the sea."}]
SHORT = ("Hello", "What is the time?", "Tell me a story about a fox.", "Why?", "word " * 20)


def settings(**changes: Any) -> LanguageSettings:
    fields = {"model": checkpoint(FAMILY), "served_model_name": "tiny", "port": 0, "dtype": "float32"}
    fields |= {"kv_blocks": BLOCKS, "max_batched_tokens": 48, "request_timeout": 60, "max_model_len": 1000}
    fields |= {"prefix_cache": False}  # what is asked again is to be told in the same words
    return LanguageSettings(**{**fields, **changes})


class Engine(Client):
    def __init__(self, session: aiohttp.ClientSession, url: str, app: LanguageApp) -> None:
        super().__init__(session, url)
        self.app = app

    async def ask(self, path: str = "/v1/chat/completions", **fields: Any) -> Answer:
        where = {"messages": MESSAGES} if path.startswith("/v1/chat") else {"prompt": "The sea"}
        return await self.post(path, {"temperature": 0, "max_tokens": 8, **where, **fields})

    async def idle(self) -> None:
        async def rests() -> bool:
            return not busy_parts(await self.get("/info"))

        await eventually(rests)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        app = await stack.enter_async_context(build(settings()))
        url = await stack.enter_async_context(running(app, settings()))
        yield Engine(session, url, app)


def wanted(max_tokens: int = 8) -> str:
    return reference(FAMILY).answer(MESSAGES, (), max_tokens)


async def test_an_openai_client_reads_it_whole_and_streamed(engine: Engine) -> None:
    async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == wanted()
        assert whole.usage is not None
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted()
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
        assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_usage_says_how_much_of_a_prompt_was_there_before() -> None:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        caching = settings(prefix_cache=True)
        app = await stack.enter_async_context(build(caching))
        engine = Engine(session, await stack.enter_async_context(running(app, caching)), app)
        told = [(await engine.ask()).body for _ in range(2)]
    assert [body["choices"][0]["message"]["content"] for body in told] == [wanted()] * 2
    first, second = (body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in told)
    assert first == 0 < second < told[0]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streamed_equals_whole(engine: Engine, path: str) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 5, "max_tokens": 12}
    whole = await engine.ask(path, **fields)
    streamed = await engine.ask(path, stream=True, **fields)
    assert streamed.done
    for index, choice in enumerate(whole.choices):
        events = [one for event in streamed.events for one in event["choices"] if one["index"] == index]
        text = "".join(one["delta"].get("content", "") if "delta" in one else one["text"] for one in events)
        assert text == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert events[-1]["finish_reason"] == choice["finish_reason"]
    assert whole.choices[0] != {**whole.choices[1], "index": 0}


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.9, "seed": 11}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_answer_goes_on_after_any_token_as_if_it_had_never_stopped(
    engine: Engine, path: str, fields: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {**fields, "max_tokens": 12, "min_tokens": 6, "return_token_ids": True, "stop": ["zq"]}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    whole = await engine.ask(path, **asked)
    told = ids_of(whole)
    assert len(told) == whole.events[-1]["usage"]["completion_tokens"] >= 6
    for cut in range(len(whole.events) - 2):
        seen = replace(whole, events=whole.events[:cut])
        if done := ids_of(seen):
            rest = await engine.ask(path, **asked, continue_token_ids=done)
            assert done + ids_of(rest) == told
            assert seen.text + rest.text == whole.text
            assert rest.events[-1]["usage"] == whole.events[-1]["usage"]
            assert rest.events[-2]["choices"][0]["finish_reason"] == whole.events[-2]["choices"][0]["finish_reason"]


def ids_of(answer: Answer) -> list[int]:
    """The tokens that a stream tells of."""
    return [one for event in answer.events for choice in event["choices"] for one in choice.get("token_ids", ())]


async def test_ids_are_the_requests(engine: Engine) -> None:
    session = engine._session
    for path, body, prefix in (
        ("/v1/chat/completions", {"messages": MESSAGES}, "chatcmpl-"),
        ("/v1/completions", {"prompt": "x"}, "cmpl-"),
    ):
        headers = {"x-request-id": "mine-7"}
        async with session.post(engine.url + path, json={**body, "max_tokens": 1}, headers=headers) as response:
            assert (await response.json())["id"] == f"{prefix}mine-7"
            assert response.headers["x-request-id"] == "mine-7"


async def test_a_stop_string_never_shows(engine: Engine) -> None:
    text = wanted(8)
    stop = text[3:5]
    cut = text[: text.index(stop)]
    whole = await engine.ask(stop=stop)
    assert (whole.text, whole.choices[0]["finish_reason"]) == (cut, "stop")
    streamed = await engine.ask(stop=[stop], stream=True)
    assert (streamed.text, streamed.done) == (cut, True)
    assert whole.body["usage"]["completion_tokens"] < 8
    await engine.idle()


async def test_min_tokens_and_ignore_eos(engine: Engine) -> None:
    answer = await engine.ask(ignore_eos=True, max_tokens=30)
    assert answer.body["usage"]["completion_tokens"] == 30
    assert answer.choices[0]["finish_reason"] == "length"
    answer = await engine.ask(min_tokens=20, max_tokens=20)
    assert answer.body["usage"]["completion_tokens"] == 20


async def test_logprobs_of_both_shapes(engine: Engine) -> None:
    content = (await engine.ask(logprobs=True, top_logprobs=2)).choices[0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == wanted()
    logprobs = (await engine.ask("/v1/completions", logprobs=2)).choices[0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 8


async def test_many_at_once_swap_and_answer_as_one_by_one(engine: Engine) -> None:
    bodies = [{"messages": [{"role": "user", "content": text}], "max_tokens": 40, "ignore_eos": True} for text in SHORT]
    alone = [(await engine.ask(**body)).text for body in bodies]
    assert (await engine.get("/info"))["preemptions"] == 0
    together = await asyncio.gather(*(engine.ask(**body) for body in bodies * 4))
    assert [answer.text for answer in together] == alone * 4
    await engine.idle()
    assert (await engine.get("/info"))["preemptions"] > 0


async def test_a_client_that_goes_away_frees_its_blocks(engine: Engine) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 170, "ignore_eos": True}
    async with engine._session.post(engine.url + "/v1/chat/completions", json=body) as response:
        await response.content.readany()
        assert (await engine.get("/info"))["free_blocks"] < BLOCKS
        response.close()
    await engine.idle()


async def test_what_can_never_fit_is_told_the_limit(engine: Engine) -> None:
    answer = await engine.ask(max_tokens=400)
    assert answer.status == 400
    assert answer.error is not None
    assert f"{BLOCKS} blocks of 16 tokens" in answer.error["message"]
    assert answer.error["code"] == "context_length_exceeded"
    answer = await engine.ask(max_tokens=4000)
    assert answer.error is not None
    assert "maximum context length is 1000 tokens" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_are_statuses(engine: Engine, stream: bool) -> None:
    image = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 4]}, "uuid": "ab" * 32}
    answer = await engine.ask(messages=[{"role": "user", "content": [image]}], stream=stream)
    assert answer.status == 400
    assert answer.error is not None
    assert (answer.error["stage"], answer.error["param"]) == ("encode", "ec_transfer_params." + "ab" * 32)
    await engine.idle()


async def test_a_stream_that_breaks_ends_with_an_error_and_without_done(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.app._parts.engine._runner
    real, steps = runner.run, 0

    def breaks(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise MemoryError("no memory left")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", breaks)
        answer = await engine.ask(stream=True, ignore_eos=True)
    assert (answer.status, answer.done) == (200, False)
    assert answer.error is not None
    assert (answer.error["code"], answer.error["stage"]) == ("model_failed", "decode")
    assert wanted().startswith("".join(e["choices"][0]["delta"]["content"] for e in answer.events[:-1]))
    assert (await engine.ask()).text == wanted()
    await engine.idle()


async def test_metrics_name_what_operators_ask_for(engine: Engine) -> None:
    await engine.ask()
    async with engine._session.get(engine.url + "/metrics") as response:
        text = await response.text()
    for name in ("waiting", "running", "free_blocks", "preemptions_total", "first_token_seconds_count"):
        assert f"\ntriptych_{name} " in text
    assert 'triptych_tokens_total{kind="generated"}' in text
    assert "triptych_per_token_seconds_bucket" in text


async def test_info_tells_what_was_loaded(engine: Engine) -> None:
    info = await engine.get("/info")
    assert (info["role"], info["num_blocks"], info["block_size"], info["max_model_len"]) == ("both", BLOCKS, 16, 1000)
    assert info["transfer"]["name"] == "shm"
    assert info["weights"]["tensors"] > 0
    assert not any("visual" in prefix for prefix in info["weights"]["prefixes"])


async def test_a_deadline_is_told_with_its_flag() -> None:
    short = settings(request_timeout=0.05, kv_blocks=100)
    async with build(short) as app, running(app, short) as url, aiohttp.ClientSession() as session:
        answer = await Engine(session, url, app).ask(max_tokens=900, ignore_eos=True)
        assert answer.status == 504
        assert answer.error is not None
        assert "--request-timeout" in answer.error["message"]
