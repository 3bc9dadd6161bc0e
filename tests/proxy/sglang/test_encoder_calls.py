"""One item at one real encoder: what it is told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.core import Instance, Leg, Role
from proxy.errors import Refused
from proxy.sglang.encoder_calls import Call, EncoderCalls, Receivers
from proxy.sglang.pieces import Part, Piece, whole
from tests.fakes.deployment import deployment
from tests.fakes.media import data_url, image
from tests.fakes.sglang import NEW, OLD, Encoder, World

URL = data_url(image())
BODY: dict[str, Any] = {
    "mm_items": [URL],
    "num_parts": 1,
    "part_idx": 0,
    "req_id": "r_local_part_0",
    "modality": "IMAGE",
    "prefill_host": "127.0.0.1",
    "embedding_port": None,
}
NOWHERE = {"req_id": "r_local_part_0", "receive_url": "127.0.0.1:9", "receive_count": 1}


def piece(**changes: Any) -> Piece:
    return whole(Part("r", 0, 1, "image", BODY | changes, (4,), (4,)))


@asynccontextmanager
async def calls(version: str) -> AsyncIterator[tuple[Encoder, EncoderCalls, Leg]]:
    async with deployment("1e1b", "auto", World(version).engines(), dialect="sglang") as it:
        (encoder,) = it.encoders
        assert isinstance(encoder, Encoder)
        proxy = it.proxy
        yield encoder, EncoderCalls(proxy.dispatcher._legs, proxy.upstream), Leg(Role.ENCODE, _listed(proxy, encoder))


def _listed(proxy: Any, encoder: Encoder) -> Instance:
    return next(instance for instance in proxy.fleet if instance.url == encoder.url)


async def test_a_new_encoder_hears_of_receivers_only_when_it_has_read_the_media() -> None:
    async with calls(NEW) as (encoder, asked, leg):
        receivers, call = Receivers(), Call(leg, piece(mm_items=["data:image/png;base64,AAAA"]), 1)
        receivers.add(NOWHERE)
        with pytest.raises(Refused, match="cannot identify") as raised:
            await asked.run(call, receivers)
        assert raised.value.status == 400 and not call.told
        assert not encoder.parts["r_local_part_0"].urls
        await asked.introduce(call, receivers)
        assert encoder.parts["r_local_part_0"].urls == {"127.0.0.1:9"}


async def test_an_old_encoder_cannot_tell_and_is_asked_only_once() -> None:
    async with calls(OLD) as (encoder, asked, leg):
        receivers = Receivers()
        receivers.add(NOWHERE)
        for number in (1, 2):
            call = Call(leg, piece(), number)
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(asked.run(call, receivers))
                await encoder.until(lambda: len(encoder.pushed) == number)  # noqa: B023
            assert answer.result() == b"null" and call.told
        assert asked._silent == {encoder.url}
        assert list(encoder.parts) == ["r_local_part_0", "r_local_part_0-2"], "every attempt under a name of its own"


async def test_every_rank_is_awaited_before_any_is_named() -> None:
    async with calls(NEW) as (encoder, asked, leg):
        receivers, call = Receivers(), Call(leg, piece(), 1)
        two = NOWHERE | {"receive_count": 2}
        receivers.add(two)
        async with asyncio.TaskGroup() as group:
            group.create_task(asked.run(call, receivers))
            await encoder.until(lambda: bool(encoder.parts) and encoder.parts["r_local_part_0"].read.is_set())
            assert not call.told
            receivers.add(two | {"receive_url": "127.0.0.1:10"})
        assert encoder.parts["r_local_part_0"].urls == {"127.0.0.1:9", "127.0.0.1:10"}


async def test_receivers_in_the_body_are_no_affair_of_ours() -> None:
    async with calls(NEW) as (encoder, asked, leg):
        call = Call(leg, piece(embedding_port=[]), 1)
        assert await asked.run(call, None) == b"null" and call.told
        assert [sent.path for sent in encoder.calls] == ["/encode"]


async def test_a_body_that_names_its_encoder_names_the_one_that_gets_it() -> None:
    leg = Leg(Role.ENCODE, Instance("http://e:1", Role.ENCODE, "sglang"))
    assert Call(leg, piece(encoder_url="http://virtual"), 1).body["encoder_url"] == "http://e:1"
    assert "encoder_url" not in Call(leg, piece(), 1).body
