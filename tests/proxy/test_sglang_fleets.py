"""Fleets of SGLang servers without the virtual encoder: halves that meet in rooms, and servers that list encoders."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.sglang import NEW, OLD, World

VERSIONS = pytest.mark.parametrize("version", [OLD, NEW])
PICTURE = part(image())


def fleet(topology: str, version: str = NEW, **settings: Any) -> Any:
    return deployment(topology, "auto", World(version).engines(), dialect="auto", **settings)


def last(found: Deployment) -> tuple[dict[str, Any], dict[str, Any]]:
    return found.prefills[0].calls[-1].body, found.decodes[0].calls[-1].body


@VERSIONS
async def test_servers_say_who_they_are(version: str) -> None:
    async with fleet("1p1d", version) as it:
        told = {instance.role.label: instance for instance in it.proxy.fleet}
        assert {one.dialect for one in told.values()} == {"sglang"}
        assert told["prefill"].facts["version"] == version and told["prefill"].facts["bootstrap_port"] == 8998
        warm = it.prefills[0].calls[0].body
        assert (warm["bootstrap_host"], warm["bootstrap_room"]) == ("2.2.2.2", 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_prefill_and_decode_meet(stream: bool) -> None:
    async with fleet("1p1d") as it:
        answer = await it.post(chat(PICTURE, stream=stream, n=2, odd=[1]))
        assert answer.status == 200 and answer.route.startswith("EP-D; ")
        prefill, decode = last(it)
        named = {name: decode[name] for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid")}
        assert prefill == decode | {"stream": False}
        assert decode == chat(PICTURE, stream=stream, n=2, odd=[1]) | named
        assert (named["bootstrap_host"], named["bootstrap_port"]) == ("127.0.0.1", 8998)
        assert named["bootstrap_room"] % 256 == 0


async def test_rooms_are_never_the_clients() -> None:
    async with fleet("1p1d") as it:
        for _ in range(3):
            assert (await it.post(chat(bootstrap_room=7, rid="x"))).status == 200
        assert not it.prefills[0].crashed and not it.decodes[0].crashed
        assert len({call.body["bootstrap_room"] for call in it.decodes[0].calls[1:]}) == 3


@pytest.mark.parametrize("failing", ["prefills", "decodes"])
async def test_the_failure_of_one_half_frees_the_other(failing: str) -> None:
    """Without /abort_request the other would wait in the room for ever."""
    async with fleet("1p1d") as it:
        server = getattr(it, failing)[0]
        server.fail(Fault(Kind.STATUS, status=500, error="out of memory"))
        answer = await it.post(chat(), x_request_id="r")
        assert answer.status == 500
        for other in (*it.prefills, *it.decodes):
            await other.until(lambda other=other: not other.running)
            assert other.aborts and other.aborts[0].startswith("r") and other.aborts[0].endswith("~")
        assert (await it.post(chat())).status == 200


async def test_another_pair_serves_what_one_could_not() -> None:
    async with fleet("2p1d") as it:
        it.prefills[0].fail(Fault(Kind.RESET))
        it.prefills[1].fail(Fault(Kind.RESET))
        first = await it.post(chat())
        assert first.status in (200, 502)
        assert (await it.post(chat(stream=True))).status == 200
        rooms = [call.body["bootstrap_room"] for call in it.decodes[0].calls[1:]]
        assert len(set(rooms)) == len(rooms), "each attempt has a room of its own"


async def test_a_client_that_leaves_takes_both_halves_along() -> None:
    async with fleet("1p1d") as it:
        it.decodes[0].gate = asyncio.Event()
        halves = (it.prefills[0], it.decodes[0])
        before = [len(engine.calls) for engine in halves]
        asking = asyncio.create_task(it.post(chat()))
        for engine, introduced in zip(halves, before, strict=True):
            await engine.until(lambda engine=engine, introduced=introduced: len(engine.calls) > introduced)
        asking.cancel()
        await it.settle()
        assert it.prefills[0].aborts == it.decodes[0].aborts != []


@VERSIONS
async def test_a_language_server_takes_media_as_they_are(version: str) -> None:
    async with fleet("1b", version) as it:
        answer = await it.post(chat(PICTURE | {"uuid": "mine"}))
        assert answer.status == 200 and answer.route.startswith("EPD; ")
        body = it.combined[0].calls[-1].body
        assert body == chat(PICTURE) | {"rid": body["rid"]}
