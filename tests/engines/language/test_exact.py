"""Language engines as processes: whatever way a request takes, its tokens are those of one `transformers` model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from bench.soak import busy_parts
from deploy.processes import Child
from engines.transfer import create
from tests.support.checkpoints import checkpoint
from tests.support.cluster import Answer, Client
from tests.support.drive import CASES, Case, case
from tests.support.metaserver import metaserver
from tests.support.reference import reference
from tests.support.waiting import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

FAMILY = "qwen3_vl"
COMMON = ["--port", "0", "--dtype", "float32", "--threads", "1", "--served-model-name", "tiny", "--kv-lease", "5"]
MIRRORED = ["--kv-mirror"]  # as on a GPU; handoffs without one are tests/system's
CHUNKS = ["--max-batched-tokens", "48"]
ENGINES = {
    "both": ["--role", "both", "--kv-blocks", "512", *CHUNKS, "--chunk-while-decoding", "16"],
    "prefill": ["--role", "prefill", "--kv-blocks", "200", *CHUNKS, "--layers-per-push", "2", *MIRRORED],
    "decode": ["--role", "decode", "--kv-blocks", "300", *MIRRORED],
}
SHORT = ("Hello", "What is the time?", "Tell me a story about a fox.", "Why?", "word " * 20)


@dataclass
class Engines:
    session: aiohttp.ClientSession
    children: dict[str, Child]

    def __getitem__(self, name: str) -> Client:
        return Client(self.session, self.children[name].url)

    async def idle(self, *names: str) -> None:
        """Wait until these engines hold nothing."""
        for name in names:

            async def rests(name: str = name) -> bool:
                return not busy_parts(await self[name].get("/info"))

            await eventually(rests, 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        model = ["--model", str(checkpoint(FAMILY))]
        children = {name: Child(name, "engines.language", [*model, *COMMON, *own]) for name, own in ENGINES.items()}
        try:
            await asyncio.gather(*(child.start() for child in children.values()))
            yield Engines(session, children)
        finally:
            codes = await asyncio.gather(*(child.stop(20) for child in children.values()))
        assert codes == [0] * len(children)


def text_of(tokens: Sequence[int]) -> str:
    return str(reference(FAMILY).tokenizer.decode(tokens, skip_special_tokens=True))


def content_of(name: str) -> list[dict[str, Any]]:
    """The case's content as the proxy would send it: handles in the place of pictures."""
    items = iter(case(FAMILY, name).items)
    content: list[dict[str, Any]] = []
    for part in CASES[name][0]:
        if part is not None:
            content.append({"type": "text", "text": part})
            continue
        item = next(items)
        described = {"image_grid_thw": list(item.grid)}
        content.append({"type": "image_embeds", "image_embeds": described, "uuid": item.mm_hash})
    return content


@asynccontextmanager
async def published(wanted: Case, withdrawn: bool = False) -> AsyncIterator[dict[str, Any]]:
    """The case's embeddings, published by this process as an encoder would; yields `ec_transfer_params`."""
    transfer = create("shm")
    arena = transfer.allocate("embeddings", 8 << 20)
    await transfer.start()
    try:
        entries, offset = {}, 0
        for item, embedding in zip(wanted.items, wanted.embeddings, strict=True):
            data = embedding.contiguous().numpy().tobytes()
            arena.buffer[offset : offset + len(data)] = data
            where = await transfer.publish(item.mm_hash, arena, [(offset, len(data))], ttl=60, on_free=lambda: None)
            shape = list(embedding.shape)
            entries[item.mm_hash] = {"num_tokens": shape[0], "dtype": "float32", "shape": shape, "where": where}
            offset += len(data)
            if withdrawn:
                transfer.withdraw(item.mm_hash)
        yield entries
    finally:
        await transfer.close()


async def through_push(engines: Engines, body: dict[str, Any], entries: dict[str, Any]) -> Answer:
    """As the proxy does it: D first, P when D calls."""

    async def prefill(descriptor: dict[str, Any]) -> tuple[int, Any]:
        own = {"kv_transfer_params": descriptor, "ec_transfer_params": entries, "stream": False, "max_tokens": 1}
        answer = await engines["prefill"].post("/v1/chat/completions", {**body, **own, "min_tokens": 1})
        return answer.status, {"status": "ok"} if answer.status == 200 else answer.body

    async with metaserver(prefill) as url:
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": url}
        return await engines["decode"].post("/v1/chat/completions", {**body, "kv_transfer_params": params})


async def through_pull(engines: Engines, body: dict[str, Any], entries: dict[str, Any]) -> Answer:
    """As the proxy does it: P first, then D with what P answered."""
    asked = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    params = {"do_remote_decode": True, "do_remote_prefill": False, **asked}
    own = {"kv_transfer_params": params, "ec_transfer_params": entries, "stream": False, "max_tokens": 1}
    answer = await engines["prefill"].post("/v1/chat/completions", {**body, **own})
    assert answer.status == 200, answer.body
    handed = {"kv_transfer_params": answer.body["kv_transfer_params"]}
    return await engines["decode"].post("/v1/chat/completions", {**body, **handed})


async def through_both(engines: Engines, body: dict[str, Any], entries: dict[str, Any]) -> Answer:
    return await engines["both"].post("/v1/chat/completions", {**body, "ec_transfer_params": entries})


WAYS = {"both": through_both, "push": through_push, "pull": through_pull}


def greedy(content: object, max_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": max_tokens, **fields}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
async def test_every_way_gives_the_reference_tokens(engines: Engines, way: str, name: str) -> None:
    wanted = case(FAMILY, name)
    async with published(wanted) as entries:
        answer = await WAYS[way](engines, greedy(content_of(name)), entries)
        assert answer.status == 200, answer.body
        assert answer.text == text_of(wanted.expected)
        assert answer.body["usage"]["prompt_tokens"] == len(wanted.token_ids)
        assert answer.body["usage"]["completion_tokens"] == len(wanted.expected)
        streamed = await WAYS[way](engines, greedy(content_of(name), stream=True), entries)
        assert streamed.text == answer.text
        assert streamed.done
        await engines.idle("both", "prefill", "decode")


@pytest.mark.parametrize("way", WAYS)
async def test_choices_share_one_prefill(engines: Engines, way: str) -> None:
    wanted = case(FAMILY, "one")
    async with published(wanted) as entries:
        answer = await WAYS[way](engines, greedy(content_of("one"), n=3), entries)
    assert [choice["message"]["content"] for choice in answer.choices] == [text_of(wanted.expected)] * 3
    assert [choice["index"] for choice in answer.choices] == [0, 1, 2]
    await engines.idle("both", "prefill", "decode")


async def test_many_at_once_answer_as_one_by_one(engines: Engines) -> None:
    bodies = [greedy(content, 40, ignore_eos=True) for content in SHORT * 4]
    alone = [(await engines["both"].post("/v1/chat/completions", body)).text for body in bodies[: len(SHORT)]]
    together = await asyncio.gather(*(engines["both"].post("/v1/chat/completions", body) for body in bodies))
    assert [answer.text for answer in together] == alone * 4
    await engines.idle("both")


async def test_pushes_and_pulls_at_the_same_time(engines: Engines) -> None:
    wanted = [case(FAMILY, name) for name in CASES]
    async with AsyncExitStack() as stack:
        entries = [await stack.enter_async_context(published(one)) for one in wanted]
        calls = [
            WAYS[way](engines, greedy(content_of(name)), known)
            for way in ("push", "pull")
            for name, known in zip(CASES, entries, strict=True)
        ]
        answers = await asyncio.gather(*calls)
    assert [answer.text for answer in answers] == [text_of(one.expected) for one in wanted] * 2
    await engines.idle("prefill", "decode")


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_goes_away_frees_everything(engines: Engines, way: str) -> None:
    body = greedy("word " * 100, 2000, ignore_eos=True, stream=True)
    task = asyncio.create_task(WAYS[way](engines, body, {}))
    name = "both" if way == "both" else "decode"

    async def decoding() -> bool:
        return bool((await engines[name].get("/info"))["running"])

    await eventually(decoding, 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engines.idle("both", "prefill", "decode")


async def test_a_lost_embedding_fails_its_request_with_stage_and_code(engines: Engines) -> None:
    async with published(case(FAMILY, "one"), withdrawn=True) as entries:
        answer = await through_both(engines, greedy(content_of("one")), entries)
    assert answer.error is not None
    assert (answer.status, answer.error["code"]) == (502, "embedding_gone")
    assert (answer.error["stage"], answer.error["retryable"]) == ("encode", True)
    await engines.idle("both")


async def test_a_refused_prefill_fails_decode_at_once_with_its_error(engines: Engines) -> None:
    async def refuse(_descriptor: dict[str, Any]) -> tuple[int, Any]:
        return 503, {"error": {"message": "no prefill engine", "stage": "prefill", "code": "overloaded"}}

    async with metaserver(refuse) as url:
        params = {"do_remote_prefill": True, "metaserver": url}
        answer = await engines["decode"].post("/v1/chat/completions", {**greedy("Hi"), "kv_transfer_params": params})
    assert answer.status == 503
    assert answer.error is not None
    assert (answer.error["message"], answer.error["stage"]) == ("no prefill engine", "prefill")
    await engines.idle("decode")


async def test_published_kv_that_nobody_reads_is_free_after_its_lease(engines: Engines) -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = await engines["prefill"].post("/v1/chat/completions", {**greedy("Hi"), "kv_transfer_params": params})
    assert (await engines["prefill"].get("/info"))["free_blocks"] < 200
    await engines.idle("prefill")
    handed = {"kv_transfer_params": answer.body["kv_transfer_params"]}
    late = await engines["decode"].post("/v1/chat/completions", {**greedy("Hi"), **handed})
    assert late.error is not None
    assert (late.status, late.error["stage"], late.error["code"]) == (502, "prefill", "kv_gone")
    await engines.idle("decode")


@pytest.mark.parametrize(("name", "hint"), [("prefill", "do_remote_decode"), ("decode", "do_remote_prefill")])
async def test_a_role_refuses_what_is_not_its_own(engines: Engines, name: str, hint: str) -> None:
    answer = await engines[name].post("/v1/chat/completions", greedy("Hi"))
    assert answer.status == 400
    assert answer.error is not None
    assert hint in answer.error["message"]
