"""Language servers, the proxy as their one encoder, and real encoders behind it: all over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, data_url, image, part
from tests.fakes.sglang import NEW, OLD, Encoder, Language, World, embedding
from tests.support.waiting import until

VERSIONS = pytest.mark.parametrize("version", [OLD, NEW])
PICTURES = [image(8 * n, 8, color=(n, n, n)) for n in range(1, 5)]
URLS = [data_url(picture) for picture in PICTURES]
BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def joined(*urls: str) -> bytes:
    return b"".join(map(embedding, urls))


def ask(*numbers: int, **fields: Any) -> dict[str, Any]:
    return chat(*(part(PICTURES[n]) for n in numbers), **fields)


@asynccontextmanager
async def fleet(version: str = NEW, topology: str = "2e1b", **settings: Any) -> AsyncIterator[Deployment]:
    world = World(version)
    async with deployment(
        topology, "auto", world.engines(), dialect="auto", virtual_encoder_port=0, **settings
    ) as found:
        world.encoders = [f"http://127.0.0.1:{found.proxy.virtual_port}"]
        yield found
        await until(lambda: repr(found.proxy.virtual) == "<VirtualEncoder 0 requests, 0 of ours>")


def server(found: Deployment) -> Language:
    return (found.combined or found.prefills)[0]  # type: ignore[return-value]


def pieces(encoder: Encoder) -> list[dict[str, Any]]:
    return [call.body for call in encoder.calls]


@VERSIONS
async def test_items_are_split_over_the_encoders_and_arrive_in_order(version: str) -> None:
    async with fleet(version) as it:
        answer = await it.post(ask(0, 1, 2, 0))
        assert answer.status == 200 and answer.route.startswith("EPD; ")
        assert answer.route.endswith("reason=4 items, the engine calls the encoders")
        assert server(it).embeddings == [joined(*(URLS[n] for n in (0, 1, 2, 0)))]
        sent = [body for encoder in it.encoders for body in pieces(encoder)]
        assert [len(pieces(encoder)) for encoder in it.encoders] == [2, 2], "by load"
        assert sorted(body["part_idx"] for body in sent) == [0, 1, 2, 3]
        assert {(body["num_parts"], len(body["mm_items"])) for body in sent} == {(4, 1)}
        rid = server(it).calls[-1].body["rid"]
        assert {body["req_id"] for body in sent} == {f"{rid}_local_part_{n}" for n in range(4)}
        assert not [call for call in it.encoders[0].calls if "encoder_url" in call.body and version == OLD]


@VERSIONS
async def test_every_rank_of_a_server_gets_the_embeddings(version: str) -> None:
    async with fleet(version, "1e1b") as it:
        server(it).tp_size = 3
        encoder = it.encoders[0]
        assert (await it.post(ask(0))).status == 200
        assert [len(one.urls) for one in encoder.parts.values()] == [3]


async def test_a_large_image_passes_unparsed_and_a_url_as_it_is() -> None:
    async with fleet(topology="1e1b") as it:
        large = "data:image/png;base64,iVBORw0KGgo" + "A" * 400_001
        far = {"type": "image_url", "image_url": {"url": "http://elsewhere.example/cat.png"}}
        answer = await it.post(chat({"type": "image_url", "image_url": {"url": large}}, far))
        assert answer.status == 200
        assert server(it).embeddings == [joined(large, "http://elsewhere.example/cat.png")]


@VERSIONS
async def test_a_dead_encoder_costs_one_more_attempt(version: str) -> None:
    async with fleet(version) as it:
        await it.encoders[0].stop()
        assert (await it.post(ask(0, 1))).status == 200
        assert server(it).embeddings == [joined(URLS[0], URLS[1])]


async def test_an_encoder_that_fails_before_it_has_read_an_item_is_left_unseen() -> None:
    async with fleet() as it:
        it.encoders[0].fail(Fault(Kind.STATUS, status=503), Fault(Kind.RESET))
        assert (await it.post(ask(0, 1, 2, 3))).status == 200
        assert server(it).embeddings == [joined(*URLS)] and not server(it).crashed
        told = (await it.get("/metrics")).body.decode()
        assert 'triptych_retries_total{stage="encode"} 2.0' in told
        assert "triptych_encode_seconds_count 1.0" in told


@VERSIONS
async def test_an_image_that_no_encoder_reads_is_the_clients_mistake_and_kills_nobody(version: str) -> None:
    async with fleet(version) as it:
        answer = await it.post(chat(part(PICTURES[0]), BROKEN))
        assert answer.status == 400
        assert "cannot identify image file" in answer.error["message"]
        assert not server(it).crashed
        assert (await it.post(ask(0))).status == 200
    if version == NEW:
        assert (answer.error["param"], answer.error["stage"]) == ("messages[0].content[2]", "encode")


async def test_a_model_that_fails_once_it_knows_the_receiver_is_beyond_help() -> None:
    """The encoder pushes its error: the server dies of it, and the client is told."""
    async with fleet(topology="1e1b") as it:
        encoder = it.encoders[0]
        encoder.failing = True
        encoder.forwards.clear()
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(it.post(ask(0)))
            await encoder.until(lambda: bool(encoder.parts))
            await next(iter(encoder.parts.values())).complete.wait()
            encoder.forwards.set()
        assert asked.result().status >= 500 and server(it).crashed


async def test_a_client_that_leaves_while_its_server_waits_does_not_take_it_along() -> None:
    async with fleet(topology="1e1b") as it:
        it.encoders[0].forwards.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await it.post(ask(0))
        await it.encoders[0].until(lambda: bool(it.encoders[0].calls))
        assert server(it).running == 1, "the server is not hung up on yet"
        it.encoders[0].forwards.set()
        await it.settle()
        assert not server(it).crashed and server(it).embeddings == [joined(URLS[0])]


async def test_without_an_encoder_no_server_is_asked() -> None:
    async with fleet(topology="1e1b") as it:
        await it.encoders[0].stop()
        await it.proxy.health.tick()
        answer = await it.post(ask(0))
        assert (answer.status, answer.error["stage"]) == (503, "encode")
        assert not [call for call in server(it).calls if "bootstrap_room" not in call.body and "messages" in call.body]
        assert (await it.post(chat())).status == 200, "text needs none"


async def test_a_server_that_waits_is_helped_by_the_encoder_that_comes_next() -> None:
    """Its last encoder dies under it: our client is told, and the server gets a black picture as soon as it can."""
    async with fleet(topology="1e1b", max_attempts=1) as it:
        encoder = it.encoders[0]
        encoder.gate = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(it.post(ask(0)))
            await encoder.until(lambda: bool(encoder.running))
            await encoder.stop()
        answer = asked.result()
        assert (answer.status, answer.error["stage"]) == (502, "encode")
        assert server(it).running == 1 and not server(it).crashed
        encoder.gate = None
        await encoder.start()
        await it.proxy.health.tick()
        await server(it).until(lambda: len(server(it).embeddings) == 1)


async def test_a_direct_client_of_the_server_gets_the_encoders_own_error() -> None:
    async with fleet(OLD, "1e1b") as it:
        body = chat(BROKEN)
        async with it.http.post(f"{server(it).url}/v1/chat/completions", json=body) as response:
            assert response.status == 400
            assert "cannot identify" in (await response.json())["message"]


async def test_prefill_waits_for_embeddings_and_meets_decode() -> None:
    async with fleet(topology="2e1p1d") as it:
        answer = await it.post(ask(0, 1, stream=True))
        assert answer.status == 200 and answer.route.startswith("EP-D; ")
        assert server(it).embeddings == [joined(URLS[0], URLS[1])]
        prefill, decode = it.prefills[0].calls[-1].body, it.decodes[0].calls[-1].body
        assert prefill["bootstrap_room"] == decode["bootstrap_room"]


# ---- the routes themselves


@asynccontextmanager
async def routes(topology: str = "2e1b", **facts: Any) -> AsyncIterator[tuple[Deployment, Any]]:
    async with fleet(topology=topology) as it:
        for instance in it.proxy.fleet:
            instance.facts = {**instance.facts, **facts}
        base = f"http://127.0.0.1:{it.proxy.virtual_port}"

        async def call(path: str, body: Any) -> tuple[int, Any]:
            async with it.http.post(base + path, json=body) as response:
                return response.status, await response.json()

        yield it, call


ENCODE = {"req_id": "r_local_part_0", "modality": "IMAGE", "mm_items": URLS[:2], "num_parts": 1, "part_idx": 0}


async def test_what_is_no_encode_request_is_refused_in_an_encoders_words() -> None:
    async with routes() as (_, call):
        answer = await call("/encode", {**ENCODE, "part_idx": 1})
        said = {"status": "error", "message": "part_idx must be in [0, num_parts)", "req_id": None}
        assert answer == (400, said)
        assert (await call("/scheduler_receive_url", {"req_id": "r"}))[0] == 400
        assert (await call("/send", {"req_id": "r"}))[0] == 404


async def test_a_part_is_encoded_once_at_a_time() -> None:
    async with routes("1e1b") as (it, call):
        it.encoders[0].forwards.clear()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(call("/encode", {**ENCODE, "embedding_port": []}))
            await it.encoders[0].until(lambda: len(it.encoders[0].calls) == 2)
            assert (await call("/encode", {**ENCODE, "embedding_port": []}))[0] == 409
            it.encoders[0].forwards.set()
        assert first.result() == (200, None)


async def test_parts_of_a_request_that_goes_to_others_too_stay_whole() -> None:
    async with routes() as (it, call):
        status, _ = await call("/encode", {**ENCODE, "num_parts": 2, "embedding_port": []})
        assert status == 200
        sent = [body for encoder in it.encoders for body in pieces(encoder)]
        assert [(body["num_parts"], body["part_idx"], len(body["mm_items"])) for body in sent] == [(2, 0, 2)]


async def test_all_modalities_of_a_request_are_numbered_through() -> None:
    async with routes("1e1b") as (it, call):
        videos = {**ENCODE, "req_id": "r_local_part_1", "modality": "VIDEO", "part_idx": 1, "mm_items": URLS[2:]}
        async with asyncio.TaskGroup() as group:
            for body in (ENCODE, videos):
                group.create_task(call("/encode", {**body, "num_parts": 2, "embedding_port": []}))
        sent = {body["part_idx"]: (body["modality"], body["mm_items"]) for body in pieces(it.encoders[0])}
        assert sent == {n: ("IMAGE" if n < 2 else "VIDEO", [URLS[n]]) for n in range(4)}


async def test_rdma_goes_on_at_the_encoder_that_has_the_part() -> None:
    async with routes("2e1b", encoder_transfer_backend="mooncake") as (it, call):
        assert (await call("/encode", {**ENCODE, "embedding_port": []}))[0] == 200
        status, sizes = await call("/scheduler_receive_meta_data", {"req_id": "r_local_part_0", "part_idx": 0})
        assert (status, sizes["embedding_size"]) == (200, 32)
        (sent,) = [body for encoder in it.encoders for body in pieces(encoder)]
        assert sent["mm_items"] == ENCODE["mm_items"]
        it.proxy.virtual._gathered.clear()  # nobody fetches: it would be kept for minutes


async def test_it_is_well_while_an_encoder_is() -> None:
    async with fleet(topology="1e1b") as it:
        url = f"http://127.0.0.1:{it.proxy.virtual_port}/health"
        async with aiohttp.ClientSession() as http:
            assert (await http.get(url)).status == 200
            await it.encoders[0].stop()
            await it.proxy.health.tick()
            assert (await http.get(url)).status == 503
