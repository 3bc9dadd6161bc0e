"""The metaserver: who is found by which id, what they are told, and the address it is found under."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from proxy.callbacks import Metaserver
from proxy.core import Instance, Role
from proxy.errors import Conflict, NotFound, ProxyError, StageTimeout, Unreachable
from proxy.places import NO_PLACES
from proxy.workers.siblings import Kind, Siblings
from tests.fakes.deployment import deployment
from tests.fakes.media import chat

D = Instance("http://127.0.0.1:9", Role.DECODE, "native")


@pytest.mark.parametrize(
    "engine_id", ["chatcmpl-a-b:1", "cmpl-a-b:1-0", "chatcmpl-a-b:1-0123abcd", "cmpl-a-b:1-0-0123abcd"]
)
async def test_a_request_is_found_by_the_engines_id(engine_id: str) -> None:
    metaserver = Metaserver("h")
    with metaserver.expect("a-b:1") as waiting:
        assert metaserver.find(engine_id) is waiting
        assert len(metaserver) == 1
    with pytest.raises(NotFound):
        metaserver.find(engine_id)


@pytest.mark.parametrize(
    "engine_id", [None, 3, "", "a", "cmpl-a-1", "cmpl-a", "chatcmpl-", "chatcmpl-b", "1_chatcmpl-a", "0_cmpl-a-0"]
)
async def test_anything_else_is_not(engine_id: object) -> None:
    metaserver = Metaserver("h")
    with metaserver.expect("a"), pytest.raises(NotFound):
        metaserver.find(engine_id)


@pytest.mark.parametrize("engine_id", ["0_chatcmpl-a", "1_chatcmpl-a", "cmpl-a-1", "1_cmpl-a-1", "1_cmpl-a-1-0123abcd"])
async def test_a_request_of_several_sequences_is_found_by_each(engine_id: str) -> None:
    metaserver = Metaserver("h")
    with metaserver.expect("a", 4) as waiting:
        assert metaserver.find(engine_id) is waiting


async def test_the_callback_ends_with_the_prefill() -> None:
    with Metaserver("h").expect("a") as waiting:
        asking = asyncio.create_task(waiting.prefill({"x": 1}))
        call = await waiting.call()
        assert (call.descriptor, call.alone) == ({"x": 1}, True)
        call.finish(None)
        call.finish(ProxyError("too late to matter"))
        await asking
        with pytest.raises(Conflict, match="asked for already"):
            await waiting.prefill({"x": 1})


async def test_each_sequence_has_a_prefill_and_an_end_of_its_own() -> None:
    with Metaserver("h").expect("a", 2) as waiting:
        asking = [asyncio.create_task(waiting.prefill({"request_id": f"{n}_chatcmpl-a"})) for n in range(2)]
        calls = [await waiting.call(), await waiting.call()]
        assert [call.descriptor["request_id"] for call in calls] == ["0_chatcmpl-a", "1_chatcmpl-a"]
        assert not any(call.alone for call in calls)
        with pytest.raises(Conflict):
            await waiting.prefill({"request_id": "2_chatcmpl-a"})
        calls[1].finish(None)
        await asking[1]
        assert not asking[0].done()
        calls[0].finish(Unreachable("no prefill"))
        with pytest.raises(Unreachable):
            await asking[0]


async def test_the_callback_gets_the_prefills_error() -> None:
    with Metaserver("h").expect("a") as waiting:
        asking = asyncio.create_task(waiting.prefill({}))
        (await waiting.call()).finish(Unreachable("no prefill"))
        with pytest.raises(Unreachable, match="no prefill"):
            await asking


async def test_a_request_that_ends_first_lets_its_callback_go() -> None:
    with Metaserver("h").expect("a") as waiting:
        asking = asyncio.create_task(waiting.prefill({}))
        await waiting.call()
    with pytest.raises(ProxyError, match="ended before"):
        await asking


async def test_an_engine_gets_no_more_calls_than_it_can_wait_for(tmp_path: Path) -> None:
    metaserver = Metaserver("h", None, Siblings(tmp_path, 2, 0))
    with await metaserver.places(D, 4, 1, 9.0), await metaserver.places(D, 4, 1, 9.0) as second:
        with pytest.raises(StageTimeout, match="too many wait"):
            await metaserver.places(D, 4, 1, 0.01)  # half of the four are this worker's
        second.leave()
        with await metaserver.places(D, 4, 1, 9.0):
            pass
    assert await metaserver.places(D, None, 99, 0.0) is NO_PLACES


async def test_one_id_waits_once() -> None:
    metaserver = Metaserver("h")
    with metaserver.expect("a"), pytest.raises(Conflict, match="in flight"), metaserver.expect("a"):
        pass
    assert len(metaserver) == 0


@pytest.mark.parametrize(
    ("host", "url", "expected"),
    [
        ("10.0.0.7", None, "http://10.0.0.7:80/v1/metaserver"),
        ("fe80::1", None, "http://[fe80::1]:80/v1/metaserver"),
        ("0.0.0.0", "https://p/meta", "https://p/meta"),
        ("0.0.0.0", None, "http://127.0.0.1:80/v1/metaserver"),
        ("::", None, "http://127.0.0.1:80/v1/metaserver"),
        ("", None, "http://127.0.0.1:80/v1/metaserver"),
    ],
)
async def test_the_address_is_one_that_the_engine_can_reach(host: str, url: str | None, expected: str) -> None:
    metaserver = Metaserver(host, url)
    metaserver.port = 80
    assert await metaserver.url_for(D) == expected == await metaserver.url_for(D)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, "http://h:80/v1/metaserver?worker=1"),
        ("https://p/meta", "https://p/meta?worker=1"),
        ("https://p/meta?x=2", "https://p/meta?x=2&worker=1"),
    ],
)
async def test_among_several_workers_the_address_names_one(url: str | None, expected: str, tmp_path: Path) -> None:
    metaserver = Metaserver("h", url, Siblings(tmp_path, 2, 1))
    metaserver.port = 80
    assert await metaserver.url_for(D) == expected


@pytest.mark.parametrize("named", ["0", "1", "2", "9", "x", None])
async def test_a_callback_reaches_who_waits_by_its_name_or_by_asking(named: str | None, tmp_path: Path) -> None:
    crew = [Siblings(tmp_path, 3, worker) for worker in range(3)]
    workers = [Metaserver("h", None, siblings) for siblings in crew]
    async with AsyncExitStack() as stack:
        for worker, siblings in zip(workers, crew, strict=True):
            await stack.enter_async_context(siblings.listening({Kind.CALLBACK: worker.answer}))
        waiting = stack.enter_context(workers[2].expect("a"))
        body = b'{"request_id": "chatcmpl-a", "x": 1}'
        asking = asyncio.create_task(workers[0].routed(body, named))
        if named in ("0", "1"):
            assert (await asking)[0] == 404, "the one that is named does not know it"
            return
        call = await waiting.call()
        assert call.descriptor["x"] == 1
        call.finish(Unreachable("no prefill"))
        status, answer = await asking
        assert (status, b"no prefill" in answer) == (502, True)


async def test_a_callback_for_a_dead_worker_is_told_so(tmp_path: Path) -> None:
    metaserver = Metaserver("h", None, Siblings(tmp_path, 2, 0))
    with pytest.raises(NotFound, match="worker 1"):
        await metaserver.routed(b'{"request_id": "chatcmpl-a"}', "1")
    status, answer = await metaserver.routed(b'{"request_id": "chatcmpl-a"}', None)
    assert (status, b"waits for a prefill" in answer) == (404, True)


async def test_push_works_behind_a_wildcard_address() -> None:
    async with deployment("1p1d", host="0.0.0.0") as d:
        assert (await d.post(chat())).status == 200
        assert d.decodes[0].callbacks == [(200, {"status": "ok"})]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"request_id": "chatcmpl-unknown"}, 404), ({}, 404), (b"{", 400), ([], 400)],
)
async def test_strangers_are_answered_in_the_error_contract(body: object, status: int) -> None:
    async with deployment("1b") as d:
        answer = await d.post(body, "/v1/metaserver")
        assert (answer.status, answer.error["stage"]) == (status, "proxy")


async def test_decode_hears_of_a_client_that_left() -> None:
    async with deployment("1p1d") as d:
        prefill, decode = d.prefills[0], d.decodes[0]
        prefill.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat()))
        await prefill.until(lambda: prefill.running == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await prefill.until(lambda: prefill.aborted == 1)
        await decode.until(lambda: decode.aborted == 1)
