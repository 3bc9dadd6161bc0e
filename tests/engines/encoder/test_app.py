"""The encoder's routes over real sockets, with a toy model behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web

from engines.encoder.app import EncoderApp, build
from engines.errors import SetupError
from engines.http import DONE
from engines.serve import running
from engines.settings import EncoderSettings
from engines.transfer.base import PeerFailed
from engines.weights import LoadReport
from tests.support.checkpoints import checkpoint
from tests.support.encoding import Toy, embedding, media, toy_encoder
from tests.support.waiting import until

PARAM = "messages[0].content[0]"
REPORT = LoadReport(("visual.blocks.0.weight", "visual.merger.weight"), 1024)


class Client:
    def __init__(self, url: str, toy: Toy, session: aiohttp.ClientSession) -> None:
        self.url, self.toy, self.session = url, toy, session

    async def encode(self, *urls: str, **extra: Any) -> tuple[int, dict[str, Any]]:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {"model": "toy", "messages": [{"role": "user", "content": content}], **extra}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    @asynccontextmanager
    async def announced(self, *urls: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The data of each event of an announcement, as it comes."""
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {"messages": [{"role": "user", "content": content}], "announce": True}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            assert response.content_type == "text/event-stream"

            async def events() -> AsyncIterator[bytes]:
                async for line in response.content:
                    if line.strip():
                        yield line.strip().removeprefix(b"data: ")

            yield events()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return await response.json() if path != "/metrics" else await response.text()

    async def cache(self) -> dict[str, int]:
        return (await self.get("/info"))["cache"]


@asynccontextmanager
async def client(**changes: Any) -> AsyncIterator[Client]:
    async with toy_encoder(**changes) as toy:
        app = EncoderApp(toy.settings, toy.encoder, toy.transfer, REPORT, {"model_type": "toy"})
        async with running(app, toy.settings) as url, aiohttp.ClientSession() as session:
            yield Client(url, toy, session)


async def test_one_handle_per_content_and_every_index() -> None:
    async with client() as it:
        status, reply = await it.encode(media(3, "a"), media(5, "b"), media(3, "a"))
        assert status == 200
        entries = list(reply["ec_transfer_params"].values())
        assert [entry["item_indices"] for entry in entries] == [[0, 2], [1]]
        assert reply["usage"]["prompt_tokens"] == 11
        assert (await it.cache())["pinned"] == 2, "the answer named them"
        for entry, expected in zip(entries, [embedding(3, "a"), embedding(5, "b")], strict=True):
            assert (await it.toy.fetch(entry["where"], expected.nbytes)).equal(expected)
        async with asyncio.timeout(10):
            while (await it.cache())["pinned"]:
                await asyncio.sleep(0.01)
        it.toy.check()


async def test_what_was_there_before_is_said_to_be_cached() -> None:
    async with client() as it:
        said = [await it.encode(media(3, "a"), media(2, seed)) for seed in ("b", "c", "b")]
        cached = [[entry["cached"] for entry in reply["ec_transfer_params"].values()] for _, reply in said]
        assert cached == [[False, False], [True, False], [True, True]]


async def test_a_handle_is_announced_before_the_model_has_run_and_its_readers_wait() -> None:
    async with client() as it:
        it.toy.model.gate.clear()
        async with it.announced(media(3, "a"), media(5, "b"), media(3, "a")) as events:
            entries = list(json.loads(await anext(events))["ec_transfer_params"].values())
            assert [entry["item_indices"] for entry in entries] == [[0, 2], [1]]
            fetching = asyncio.create_task(it.toy.fetch(entries[1]["where"], embedding(5, "b").nbytes))
            await until(lambda: it.toy.transfer.audit()["pushes"] == 1)
            assert not fetching.done() and it.toy.model.items == 0
            it.toy.model.gate.set()
            assert (await fetching).equal(embedding(5, "b"))
            assert await anext(events) == b"[DONE]"
            assert [rest async for rest in events] == []
        # One was named and read, the other is still promised to a reader.
        await until(lambda: it.toy.encoder.cache_info()["pinned"] == 1)
        assert (await it.toy.fetch(entries[0]["where"], embedding(3, "a").nbytes)).equal(embedding(3, "a"))
        await until(lambda: it.toy.encoder.cache_info()["pinned"] == 0)
        it.toy.check()


async def test_who_joins_a_flight_is_told_at_once_where_it_will_land() -> None:
    async with client() as it:
        it.toy.model.gate.clear()
        async with it.announced(media(3)) as first, it.announced(media(3)) as second:
            said = [json.loads(await anext(events))["ec_transfer_params"] for events in (first, second)]
            assert said[0] == said[1]
            it.toy.model.gate.set()
            assert [await anext(events) for events in (first, second)] == [b"[DONE]"] * 2
        assert it.toy.model.items == 1


async def test_a_failure_after_the_announcement_is_told_to_the_caller_and_to_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with client() as it:
        it.toy.model.gate.clear()
        async with it.announced(media(3)) as events:
            (entry,) = json.loads(await anext(events))["ec_transfer_params"].values()
            fetching = asyncio.create_task(it.toy.fetch(entry["where"], embedding(3).nbytes))
            await until(lambda: it.toy.transfer.audit()["pushes"] == 1)
            monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: 1 / 0)
            it.toy.model.gate.set()
            error = json.loads(await anext(events))["error"]
            assert (error["stage"], error["code"], error["param"]) == ("encode", "encode_failed", PARAM)
            assert [rest async for rest in events] == []
            with pytest.raises(PeerFailed, match="promised"):
                await fetching
        await until(lambda: it.toy.encoder.cache_info()["bytes"] == 0)
        it.toy.check()


async def test_a_caller_that_leaves_breaks_the_promise_unless_the_model_has_begun() -> None:
    async with client() as it:
        it.toy.model.gate.clear()
        async with it.announced(media(3, "begun")) as begun:
            await anext(begun)
            await asyncio.to_thread(it.toy.model.entered.acquire)
            async with it.announced(media(3, "waits")) as waits:
                (entry,) = json.loads(await anext(waits))["ec_transfer_params"].values()
                fetching = asyncio.create_task(it.toy.fetch(entry["where"], embedding(3).nbytes))
                await until(lambda: it.toy.transfer.audit()["pushes"] == 1)
            with pytest.raises(PeerFailed, match="promised"):
                await fetching
            it.toy.model.gate.set()
            assert await anext(begun) == b"[DONE]"
        it.toy.check()


async def test_nothing_stays_pinned_for_a_caller_that_leaves_with_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = web.StreamResponse.write

    async def write_and_leave(response: web.StreamResponse, data: bytes) -> None:
        await write(response, data)
        task = asyncio.current_task()
        if data == DONE and task is not None:
            task.cancel()  # as aiohttp does to the handler of a connection that is closed

    monkeypatch.setattr(web.StreamResponse, "write", write_and_leave)
    async with client() as it:
        async with it.announced(media(3)) as events:
            (entry,) = json.loads(await anext(events))["ec_transfer_params"].values()
            assert (await it.toy.fetch(entry["where"], embedding(3).nbytes)).equal(embedding(3))
        await until(lambda: it.toy.encoder.cache_info()["pinned"] == 0)


async def test_what_is_known_at_once_is_not_announced(tmp_path: Path) -> None:
    async with client() as it:
        await it.encode(media(3))
        status, reply = await it.encode(media(3), announce=True)
        assert (status, len(reply["ec_transfer_params"])) == (200, 1)
        status, reply = await it.encode(media(1, "broken"), announce=True)
        assert (status, reply["error"]["code"]) == (400, "invalid_image")
    async with client(transport="storage", folder=tmp_path) as it:
        status, reply = await it.encode(media(3), announce=True)
        assert (status, len(reply["ec_transfer_params"])) == (200, 1)


async def test_a_broken_item_is_named_and_its_neighbours_are_cached() -> None:
    async with client() as it:
        status, reply = await it.encode(media(3, "a"), media(1, "broken"), media(2, "b"))
        assert (status, reply["error"]["param"]) == (400, "messages[0].content[1]")
        assert (reply["error"]["code"], reply["error"]["stage"]) == ("invalid_image", "encode")
        assert "messages[0].content[1]" in reply["error"]["message"]
        assert (await it.cache())["items"] == 2
        assert (await it.encode(media(3, "a"), media(2, "b")))[0] == 200
        assert it.toy.model.items == 2


async def test_a_failure_that_no_retry_mends_is_told_first() -> None:
    async with client(tokens=10) as it:
        assert (await it.encode(media(10, "full")))[0] == 200
        status, reply = await it.encode(media(3, "a"), media(1, "broken"))
        assert (status, reply["error"]["code"]) == (400, "invalid_image")
        status, reply = await it.encode(media(3, "a"))
        assert (status, reply["error"]["code"], reply["error"]["retryable"]) == (503, "cache_full", True)


async def test_a_client_that_leaves_cancels_its_items() -> None:
    async with client(max_batch_patches=1) as it:
        it.toy.model.gate.clear()
        first = asyncio.create_task(it.encode(media(1, "first")))
        assert await asyncio.to_thread(it.toy.model.entered.acquire, timeout=30)
        leaver = asyncio.create_task(it.encode(media(1, "x"), media(1, "y")))
        async with asyncio.timeout(10):
            while it.toy.encoder.queue()["waiting"] < 2:
                await asyncio.sleep(0.001)
            leaver.cancel()
            while it.toy.encoder.queue()["waiting"]:
                await asyncio.sleep(0.001)
        it.toy.model.gate.set()
        assert (await first)[0] == 200
        assert it.toy.model.items == 1
        it.toy.check()


async def test_the_deadline_names_its_flag_and_unpins() -> None:
    async with client(encode_timeout=0.05) as it:
        it.toy.model.gate.clear()
        status, reply = await it.encode(media(1, "a"))
        assert (status, reply["error"]["code"]) == (504, "encode_timeout")
        assert "--encode-timeout" in reply["error"]["message"]
        it.toy.model.gate.set()


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"model": "gpt"}, 404),
        ({"stream": True}, 400),
        ({"mm_processor_kwargs": {"fps": 0}}, 400),
        ({"mm_processor_kwargs": {"min_pixels": 100}}, 200),
        ({"messages": []}, 400),
    ],
)
async def test_requests_are_checked_before_anything_is_done(extra: dict[str, Any], status: int) -> None:
    async with client() as it:
        assert (await it.encode(media(1), **extra))[0] == status
        assert it.toy.model.items == (status == 200)


async def test_info_and_metrics() -> None:
    async with client() as it:
        await it.encode(media(3), media(3))
        info = await it.get("/info")
        assert info["role"] == "encode"
        assert info["weights"] == {"tensors": 2, "bytes": 1024, "prefixes": ["visual.blocks", "visual.merger"]}
        assert info["cache"]["items"] == info["transfer"]["audit"]["publications"] == 1
        assert info["vision"] == {"model_type": "toy"}
        assert info["transfer"]["nonce"] == it.toy.transfer.address.nonce
        assert info["queue"] == {"items": 0, "waiting": 0, "running": 0, "patches": 0}
        metrics = await it.get("/metrics")
        assert "triptych_encode_batch_items_sum 1.0" in metrics
        assert 'triptych_encode_stage_seconds_count{stage="decode"} 1.0' in metrics


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": Path("/nowhere")}, "--model /nowhere is not a folder"),
        ({"model": Path(__file__).parent}, "--model"),
        ({"transfer": "storage", "storage_path": Path("/proc/nowhere")}, "--transfer storage"),
    ],
)
async def test_what_cannot_start_names_its_flag(changes: dict[str, Any], says: str) -> None:
    settings = EncoderSettings(**{"model": checkpoint("qwen2_vl"), "cache_bytes": "1MiB", **changes})
    with pytest.raises(SetupError, match=says):
        async with build(settings):
            pass
