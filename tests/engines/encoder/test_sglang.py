"""SGLang's encoder protocol over real sockets, as both of its versions speak it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import torch
import zmq
import zmq.asyncio

from engines.encoder.app import EncoderApp
from engines.encoder.sglang import parse
from engines.errors import BadRequest
from engines.serve import running
from engines.weights import LoadReport
from tests.support.encoding import WIDTH, Toy, embedding, media, toy_encoder
from tests.support.sglang import EmbeddingData, Modality, read

OLD: dict[str, Any] = {
    "encoder_idx": 0,
    "num_parts": 2,
    "part_idx": 1,
    "req_id": "r_local_part_1",
    "modality": "IMAGE",
    "prefill_host": "127.0.0.1",
    "embedding_port": None,
}
NEW = OLD | {"encoder_url": "http://virtual", "time_stats_json": None}
VERSIONS = pytest.mark.parametrize("body", [OLD, NEW], ids=["0.5.10", "0.5.23"])
REGISTERED = {"req_id": OLD["req_id"], "receive_count": 1, "modality": "IMAGE"}


class Receiver:
    """One rank of a language server."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._pull = context.socket(zmq.PULL)
        self.port = self._pull.bind_to_random_port("tcp://127.0.0.1")
        self.url = f"127.0.0.1:{self.port}"

    async def got(self) -> tuple[EmbeddingData, torch.Tensor | None]:
        async with asyncio.timeout(10):
            first, *rest = await self._pull.recv_multipart()
        found = read(first)
        return found, torch.frombuffer(bytearray(rest[0]), dtype=found.dtype).view(found.shape) if rest else None


class Server:
    def __init__(self, url: str, toy: Toy, http: aiohttp.ClientSession, context: zmq.asyncio.Context) -> None:
        self._url, self.toy, self._http, self._context = url, toy, http, context

    def receiver(self) -> Receiver:
        return Receiver(self._context)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self._http.post(self._url + path, json=body) as response:
            return response.status, await response.json()


@asynccontextmanager
async def server(**changes: Any) -> AsyncIterator[Server]:
    context = zmq.asyncio.Context()
    try:
        async with toy_encoder(sglang=True, **changes) as toy:
            app = EncoderApp(toy.settings, toy.encoder, toy.transfer, LoadReport((), 0), {})
            async with running(app, toy.settings) as url, aiohttp.ClientSession() as http:
                yield Server(url, toy, http, context)
            await app.close()
            toy.check()
    finally:
        context.destroy(linger=0)


@VERSIONS
async def test_the_rows_of_all_items_arrive_in_order_with_what_they_are(body: dict[str, Any]) -> None:
    async with server() as it, asyncio.TaskGroup() as group:
        rank = it.receiver()
        answer = group.create_task(it.post("/encode", body | {"mm_items": [media(3, "a"), {"url": media(2, "b")}]}))
        assert await it.post("/scheduler_receive_url", REGISTERED | {"receive_url": rank.url}) == (200, None)
        found, rows = await rank.got()
        assert await answer == (200, None)
        assert rows is not None and rows.equal(torch.cat([embedding(3, "a"), embedding(2, "b")]))
        assert found.module.endswith("encoder.receiver" if "encoder_url" in body else "encode_receiver")
        assert (found.req_id, found.num_parts, found.part_idx) == ("r_local_part_1", 2, 1)
        assert found.modality is Modality.IMAGE and found.grid_dim.tolist() == [[1, 1, 3], [1, 1, 2]]
        assert (found.dtype, found.shape, found.error_msg, found.embedding) == (torch.float32, [5, WIDTH], None, None)
        assert not it.toy.encoder.cache_info()["pinned"], "nobody has to come for them"


async def test_videos_tell_their_times() -> None:
    async with server() as it, asyncio.TaskGroup() as group:
        rank = it.receiver()
        body = NEW | {"modality": "VIDEO", "mm_items": [media(3, "a"), media(2, "b")]}
        group.create_task(it.post("/encode", body))
        await it.post("/scheduler_receive_url", REGISTERED | {"receive_url": rank.url})
        found, _ = await rank.got()
        assert found.modality is Modality.VIDEO and found.grid_dim.tolist() == [[1, 1, 3], [1, 1, 2]]
        assert (found.video_timestamps, found.second_per_grid_ts) == ([[0.5], [0.5]], [1.0, 1.0])


async def test_a_receiver_may_register_first_and_every_rank_gets_all() -> None:
    async with server() as it:
        ranks = [it.receiver(), it.receiver()]
        for rank in ranks:
            told = REGISTERED | {"receive_count": 2, "receive_url": rank.url}
            assert await it.post("/scheduler_receive_url", told) == (200, None)
        assert await it.post("/encode", NEW | {"mm_items": [media(3)]}) == (200, None)
        for rank in ranks:
            _, rows = await rank.got()
            assert rows is not None and rows.equal(embedding(3))


@pytest.mark.parametrize("scalar", [False, True])
async def test_receivers_may_stand_in_the_body(scalar: bool) -> None:
    async with server() as it:
        rank = it.receiver()
        port = rank.port if scalar else [rank.port]
        assert await it.post("/encode", NEW | {"mm_items": [media(1)], "embedding_port": port}) == (200, None)
        assert (await rank.got())[1] is not None


async def test_its_size_is_told_once_it_is_there() -> None:
    async with server() as it, asyncio.TaskGroup() as group:
        size = group.create_task(it.post("/scheduler_receive_meta_data", {"req_id": OLD["req_id"], "part_idx": 1}))
        group.create_task(it.post("/encode", NEW | {"mm_items": [media(3)]}))
        sizes = {"embedding_size": 3 * WIDTH * 4, "embedding_len": 3, "embedding_dim": WIDTH}
        assert await size == (200, {"req_id": OLD["req_id"], "part_idx": 1, **sizes})
        rank = it.receiver()
        await it.post("/scheduler_receive_url", REGISTERED | {"receive_url": rank.url})


@VERSIONS
async def test_an_error_is_answered_at_once_and_pushed_to_whoever_registers(body: dict[str, Any]) -> None:
    async with server() as it:
        status, said = await it.post("/encode", body | {"mm_items": [media(3), media(1, "broken")]})
        assert (status, said["status"], said["req_id"]) == (400, "error", OLD["req_id"])
        assert said["message"] == "mm_items[1]: the image cannot be decoded"
        assert (await it.post("/scheduler_receive_meta_data", {"req_id": OLD["req_id"], "part_idx": 1}))[0] == 500
        rank = it.receiver()
        await it.post("/scheduler_receive_url", REGISTERED | {"receive_url": rank.url})
        found, rows = await rank.got()
        assert rows is None and (found.error_msg, found.error_code) == (said["message"], 400)


async def test_a_receiver_that_never_comes_is_told_of() -> None:
    async with server(encode_timeout=0.2) as it:
        status, said = await it.post("/encode", OLD | {"mm_items": [media(1)]})
        assert (status, said["message"]) == (504, "no receiver took the embedding in time")
        status, said = await it.post("/scheduler_receive_meta_data", {"req_id": "other", "part_idx": 0})
        assert status == 504


async def test_without_the_flag_nobody_can_have_embeddings_pushed() -> None:
    async with toy_encoder() as toy:
        app = EncoderApp(toy.settings, toy.encoder, toy.transfer, LoadReport((), 0), {})
        async with running(app, toy.settings) as url, aiohttp.ClientSession() as http:
            response = await http.post(f"{url}/encode", json=OLD)
            assert response.status == 404


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"req_id": None}, "req_id"),
        ({"part_idx": 2}, "part_idx must be in"),
        ({"modality": "AUDIO"}, "none of its models has audio"),
        ({"mm_items": []}, "missing or empty"),
        ({"mm_items": [{"detail": "low"}]}, "an item is a string"),
    ],
)
def test_what_is_no_part_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        parse(NEW | {"mm_items": ["x"]} | change)


def test_an_item_may_be_bare_base64() -> None:
    text = base64.b64encode(b"picture").decode()
    assert [item.url for item in parse(OLD | {"mm_items": [text, "http://a/b", {"url": "data:,x"}]})] == [
        f"data:;base64,{text}",
        "http://a/b",
        "data:,x",
    ]
