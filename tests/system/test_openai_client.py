"""The official client cannot tell the proxy from an engine: the same calls, made to both, return the same objects.

What may differ is what is made anew for each answer: its id and its date.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from deploy.processes import Child
from tests.fakes.native import Call, Language
from tests.support.cluster import LANGUAGE, Client, Cluster, cluster
from tests.support.waiting import eventually
from tests.system.topologies import fronts, ready

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FRONTS = ("both", "P+D push", "P+D pull")
ANEW = {"id", "created", "system_fingerprint"}
JOINED = {"content", "text", "arguments"}
"""Strings that a stream brings in pieces, which end where the engine's steps happened to end."""

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something about the sea."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Say something"}, {"type": "text", "text": " short."}]}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED = [
    {"role": "user", "content": "How is the weather in Ulm?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Ulm"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 °C"},
]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "The sea is", "max_tokens": 10, "temperature": 0}
LONG: dict[str, Any] = {**CHAT, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
SEEDED = {"temperature": 0.9, "seed": 17, "top_p": 0.9}
USAGE = {"stream_options": {"include_usage": True}}
HOW: tuple[dict[str, Any], ...] = ({}, {"stream": True, **USAGE}, {"stream": True})

CALLS: dict[str, dict[str, Any]] = {
    "greedy": CHAT,
    "parts": {**CHAT, "messages": PARTS},
    "tools": {**CHAT, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    "no tool wanted": {**CHAT, "tools": [TOOL], "tool_choice": "none"},
    "a tool's answer": {**CHAT, "messages": CALLED, "tools": [TOOL]},
    "logprobs": {**CHAT, "logprobs": True},
    "top logprobs": {**CHAT, "logprobs": True, "top_logprobs": 3},
    "seeded choices": {**CHAT, **SEEDED, "n": 2, "logprobs": True},
    "stop": {**CHAT, "stop": ["e", "zq"], "max_completion_tokens": 40},
    "penalties": {**CHAT, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {}},
    "extras": {**CHAT, "user": "u", "metadata": {"a": "b"}, "extra_body": {"top_k": 5, "min_tokens": 4, "x_new": [1]}},
    "completion": TEXT,
    "token ids": {**TEXT, "prompt": [5, 6, 7, 8]},
    "completion logprobs": {**TEXT, "logprobs": 2},
    "seeded completions": {**TEXT, **SEEDED, "n": 2, "stop": "a"},
}
MISTAKES: dict[str, dict[str, Any]] = {
    "another model": {**CHAT, "model": "gpt-0"},
    "no message": {**CHAT, "messages": []},
    "too hot": {**CHAT, "temperature": 3},
    "no tokens": {**CHAT, "max_tokens": 0},
    "too many choices": {**CHAT, "n": 1000},
    "too long": {**CHAT, "max_tokens": 1, "messages": [{"role": "user", "content": "word " * 20_000}]},
    "too much to say": {**CHAT, "max_tokens": 1_000_000},
    "too many logprobs": {**CHAT, "logprobs": True, "top_logprobs": 50},
    "echo": {**TEXT, "echo": True},
}

Anyone = OpenAI | AsyncOpenAI
Connect = Callable[[str], Anyone]
CLIENTS: dict[str, Callable[..., Anyone]] = {"sync": OpenAI, "async": AsyncOpenAI}


@dataclass
class Place:
    """A `both` engine, and proxies in front of it and of separate ones."""

    engines: Cluster
    proxies: Mapping[str, Client]

    @property
    def direct(self) -> str:
        return self.engines.engine("both").url

    async def idle(self) -> None:
        """Nothing is held by an engine or a proxy any more."""

        async def nothing_leased() -> bool:
            shown = [await proxy.get("/instances") for proxy in self.proxies.values()]
            return not any(instance["leases"] for each in shown for instance in each["instances"])

        await eventually(nothing_leased)
        await self.engines.idle()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    leases = {
        "prefill": (*LANGUAGE, "--kv-lease", "3")
    }  # of what a decode engine that refuses the request never fetches
    async with cluster("qwen2_5_vl", "1p1d", role_arguments=leases) as engines, fronts(engines, FRONTS) as proxies:
        yield Place(engines, proxies)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=CLIENTS)
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """The client of one kind for each URL."""
    made: dict[str, Anyone] = {}

    def client(url: str) -> Anyone:
        if url not in made:
            made[url] = CLIENTS[request.param](base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        return made[url]

    yield client
    for one in made.values():
        if isinstance(one, OpenAI):
            one.close()
        else:
            await one.close()


async def call(client: Anyone, method: Callable[..., Any], **fields: Any) -> Any:
    """What `method` of `client` returns."""
    return await asyncio.to_thread(method, **fields) if isinstance(client, OpenAI) else await method(**fields)


async def ask(client: Anyone, **fields: Any) -> list[Any]:
    """The object of an answer; the objects of a streamed one."""
    answer = await call(client, _resource(client, fields).create, **fields)
    if not fields.get("stream"):
        return [answer]
    return await asyncio.to_thread(list, answer) if isinstance(client, OpenAI) else [chunk async for chunk in answer]


def _resource(client: Any, fields: Mapping[str, Any]) -> Any:
    return client.chat.completions if "messages" in fields else client.completions


def facts(objects: list[Any]) -> dict[tuple[str, ...], Any]:
    """Every field of an answer by its path: joined, listed in lists, else its different values in order."""
    found: dict[tuple[str, ...], Any] = {}
    for one in objects:
        for path, value in _leaves(one.to_dict()):
            if path[0] in ANEW:
                continue
            if path[-1] in JOINED and "*" not in path:
                found[path] = found.get(path, "") + (value or "")
            elif "*" in path or value not in found.setdefault(path, []):
                found.setdefault(path, []).append(value)
    return found


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Choices and tool calls by their index, entries of other lists one after another."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    elif isinstance(value, list) and value:
        for inner in value:
            where = str(inner["index"]) if isinstance(inner, dict) and "index" in inner else "*"
            yield from _leaves(inner, (*path, where))
    else:
        yield path, value


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    assert {type(one) for one in found} == {type(one) for one in wanted}
    fields, expected = facts(found), facts(wanted)
    assert fields.keys() == expected.keys()
    for path, value in expected.items():
        assert _close(fields[path], value), (path, fields[path], value)


def _close(one: Any, other: Any) -> bool:
    """Equal; log probabilities may differ in the digits that the order of a sum decides."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-4)
    return bool(one == other)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("front", FRONTS)
async def test_every_call_returns_what_it_returns_from_an_engine(
    place: Place, connect: Connect, front: str, name: str
) -> None:
    direct, proxied = connect(place.direct), connect(place.proxies[front].url)
    for how in HOW if name == "greedy" else HOW[:2]:
        wanted = await ask(direct, **CALLS[name], **how)
        assert_same(await ask(proxied, **CALLS[name], **how), wanted)


async def test_what_is_compared_is_there(place: Place, connect: Connect) -> None:
    """Of an answer without text, choices, logprobs or usage, all would be alike."""
    client = connect(place.proxies["P+D push"].url)
    whole = facts(await ask(client, **CALLS["top logprobs"]))
    streamed = facts(await ask(client, **CALLS["top logprobs"], stream=True, **USAGE))
    assert len(whole["choices", "0", "logprobs", "content", "*", "top_logprobs", "*", "logprob"]) == 30
    assert whole["choices", "0", "message", "content"] == streamed["choices", "0", "delta", "content"] != ""
    assert streamed["choices", "0", "finish_reason"] == [None, "length"]
    assert [whole["usage", "completion_tokens"], streamed["usage", "completion_tokens"]] == [[10], [10]]
    choices = facts(await ask(client, **CALLS["seeded choices"]))
    assert choices["choices", "0", "message", "content"] != choices["choices", "1", "message", "content"]
    prompts = [facts(await ask(client, **CALLS[name]))["usage", "prompt_tokens"] for name in ("greedy", "tools")]
    assert prompts[0] < prompts[1]


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("front", FRONTS)
async def test_a_mistake_raises_what_an_engine_makes_it_raise(
    place: Place, connect: Connect, front: str, name: str
) -> None:
    for stream in (False, True):
        raised = []
        for url in (place.direct, place.proxies[front].url):
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(connect(url), **MISTAKES[name], stream=stream)
            error = caught.value
            assert isinstance(error.body, dict) and error.request_id
            raised.append((type(error), error.status_code, error.type, error.param, error.code, error.body["message"]))
        assert raised[0] == raised[1]
        assert raised[0][1] in (400, 404)


@pytest.mark.parametrize("front", FRONTS)
async def test_the_stream_helper_gathers_the_same_answer(place: Place, front: str) -> None:
    gathered = []
    for url in (place.direct, place.proxies[front].url):
        async with (
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            client.chat.completions.stream(**CALLS["top logprobs"], **USAGE) as stream,
        ):
            kinds = {event.type async for event in stream}
            gathered.append((kinds, stream.current_completion_snapshot))
    (wanted_kinds, wanted), (kinds, found) = gathered
    assert kinds == wanted_kinds
    assert_same([found], [wanted])


@pytest.mark.parametrize("front", FRONTS)
async def test_the_raw_response_and_the_request_id(place: Place, connect: Connect, front: str) -> None:
    for url in (place.direct, place.proxies[front].url):
        client = connect(url)
        for fields, prefix in ((CHAT, "chatcmpl-"), (TEXT, "cmpl-")):
            create = _resource(client, fields).with_raw_response.create
            raw = await call(client, create, **fields, extra_headers={"x-request-id": "mine-1"})
            answer = raw.parse()
            assert (raw.status_code, raw.request_id, answer._request_id) == (200, "mine-1", "mine-1")
            assert answer.id == f"{prefix}mine-1"
            assert raw.headers["content-type"].partition(";")[0] == "application/json"
            assert int(raw.headers["content-length"]) == len(raw.content)


@pytest.mark.parametrize("front", FRONTS)
async def test_the_models(place: Place, connect: Connect, front: str) -> None:
    urls = (place.direct, place.proxies[front].url)
    direct, proxied = [await call(client, client.models.list) for client in map(connect, urls)]
    assert_same(proxied.data, direct.data)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("front", FRONTS)
async def test_a_client_that_gives_up_leaves_nothing_behind(
    place: Place, connect: Connect, front: str, stream: bool
) -> None:
    for url in (place.direct, place.proxies[front].url):
        client = connect(url)
        if stream:
            await _first_of_many(client)
        else:
            with pytest.raises(openai.APITimeoutError):
                await ask(client.with_options(timeout=0.5), **LONG)
        await place.idle()


async def _first_of_many(client: Anyone) -> None:
    """Read a stream's first chunk and close it."""
    chunks = await call(client, client.chat.completions.create, **LONG, stream=True)
    if isinstance(client, OpenAI):
        with chunks:
            assert (await asyncio.to_thread(next, chunks)).choices
    else:
        async with chunks:
            assert (await anext(chunks)).choices


@pytest.mark.parametrize("front", FRONTS)
async def test_a_cancelled_call_is_cancelled_at_the_engine(place: Place, front: str) -> None:
    async with AsyncOpenAI(base_url=f"{place.proxies[front].url}/v1", api_key="none", max_retries=0) as client:
        task = asyncio.create_task(client.chat.completions.create(**LONG))
        role = "both" if front == "both" else "decode"

        async def runs() -> bool:
            return bool((await place.engines.info(role))["running"])

        await eventually(runs)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert task.cancelled()
    await place.idle()


# ---- what our engines do not say, others do


class Caller(Language):
    """Thinks, calls two tools, refuses, and adds fields that nobody knows."""

    TOOLS = ("get_weather", '{"city":', ' "Zürich 🌧"}'), ("get_time", "{}", "")

    async def reply(self, call: Call) -> dict[str, Any]:
        calls = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": begin + end}}
            for n, (name, begin, end) in enumerate(self.TOOLS)
        ]
        message = {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "refusal": None,
            "tool_calls": calls,
        }
        answer = await super().reply(call)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls", "stop_reason": 7}
        return answer | {"choices": [choice], "service_tier": "default", "prompt_logprobs": None}

    def _events(self, call: Call) -> list[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}, {"reasoning_content": "hm"}]
        for n, (name, begin, end) in enumerate(self.TOOLS):
            function = {"name": name, "arguments": ""}
            deltas.append({"tool_calls": [{"index": n, "id": f"call_{n}", "type": "function", "function": function}]})
            deltas += [{"tool_calls": [{"index": n, "function": {"arguments": part}}]} for part in (begin, end)]
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        choices.append({"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls", "stop_reason": 7})
        head = {"id": f"chatcmpl-{call.id}", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
        usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16, "prompt_tokens_details": None}
        chunks = [*({**head, "choices": [choice]} for choice in choices), {**head, "choices": [], "usage": usage}]
        data = [json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks]
        return [*(b"data: " + one + b"\n\n" for one in data), b"data: [DONE]\n\n"]


async def test_tool_calls_and_unknown_fields(connect: Connect) -> None:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Caller())
        where = ("--prefill-servers-urls", "disable", "--decode-servers-urls", engine.url)
        proxy = Child("proxy", "proxy", ["--port", "0", "--host", "127.0.0.1", *where])
        stack.push_async_callback(proxy.stop)
        await proxy.start()
        session = await stack.enter_async_context(aiohttp.ClientSession())
        await ready(Client(session, proxy.url))
        for how in HOW:
            asked = {**CALLS["tools"], **how, "extra_headers": {"x-request-id": "one"}}
            wanted, found = await ask(connect(engine.url), **asked), await ask(connect(proxy.url), **asked)
            assert_same(found, wanted)
            assert "Zürich 🌧" in str(facts(found))
        assert engine.calls[0].body == engine.calls[1].body
