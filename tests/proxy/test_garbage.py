"""A request is gone once it is answered, with all its bytes: nothing of it waits for the collector, however it ended.

The collector runs rarely in a proxy, and what lived through one pass of it may stay for hours.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from proxy.core import Job
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.waiting import until

PICTURE = part(image())


_others: list[Job] = []  # that were there before, whoever keeps them


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    _others[:] = [found for found in gc.get_objects() if type(found) is Job]
    yield
    _others.clear()
    gc.enable()


def jobs() -> list[Job]:
    """Those of this test."""
    others = {id(job) for job in _others}
    return [found for found in gc.get_objects() if type(found) is Job and id(found) not in others]


async def gone(d: Deployment) -> None:
    await d.settle()
    with suppress(TimeoutError):
        await until(lambda: not jobs(), 2)
    assert not jobs()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("topology", "handoff"), [("1b", "push"), ("1e1p1d", "push"), ("1e1p1d", "pull")])
async def test_a_request_that_is_served(uncollected: None, topology: str, handoff: str, stream: bool) -> None:
    async with deployment(topology, handoff) as d:
        assert (await d.post(chat(*([PICTURE] if d.encoders else []), stream=stream))).status == 200
        await gone(d)


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.STATUS, Kind.HANG])
@pytest.mark.parametrize("topology", ["1e1p1d", "2e1p1d"])
async def test_a_request_whose_encoder_fails(uncollected: None, topology: str, kind: Kind) -> None:
    async with deployment(topology, encode_timeout=0.3) as d:
        d.encoders[0].always = Fault(kind)
        for _ in range(2):
            await d.post(chat(PICTURE))
        await gone(d)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", [Kind.RESET, Kind.STATUS, Kind.TRUNCATED, Kind.ERROR_EVENT])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_a_request_whose_engine_fails(
    uncollected: None, handoff: str, stage: str, kind: Kind, stream: bool
) -> None:
    async with deployment("1p1d", handoff) as d:
        failing: list[Any] = d.prefills if stage == "prefill" else d.decodes
        failing[0].fail(Fault(kind, after=2))
        await d.post(chat(stream=stream))
        await gone(d)


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_a_request_whose_client_leaves(uncollected: None, handoff: str, stage: str) -> None:
    async with deployment("1e1p1d", handoff) as d:
        engine: Any = {"encode": d.encoders, "prefill": d.prefills, "decode": d.decodes}[stage][0]
        engine.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat(PICTURE, stream=True)))
        await until(lambda: engine.running)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await until(lambda: not engine.running)
        await gone(d)


@pytest.mark.parametrize(
    "body", [b"{", chat(kv_transfer_params={}), chat(PICTURE)], ids=["no JSON", "refused", "nowhere"]
)
async def test_a_request_that_no_engine_sees(uncollected: None, body: Any) -> None:
    async with deployment("1b") as d:
        assert (await d.post(body)).status == 400
        await gone(d)


@pytest.mark.parametrize("kind", [Kind.ERROR_EVENT, Kind.TRUNCATED])
async def test_a_request_to_which_an_embedding_was_promised(uncollected: None, kind: Kind) -> None:
    async with deployment("1e1p1d", "pull") as d:
        d.encoders[0].computing, d.encoders[0].breaks = asyncio.Event(), Fault(kind, status=500, error="ill")
        d.prefills[0].always = Fault(Kind.HANG)
        asking = asyncio.create_task(d.post(chat(PICTURE)))
        await d.prefills[0].until(lambda: d.prefills[0].running == 1)
        d.prefills[0].always = None
        d.encoders[0].computing.set()
        assert (await asking).status == 200
        await gone(d)
