"""A request becomes a job, large or small, with all that was learnt."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.core import Api, Job
from proxy.errors import BadRequest, ForbiddenMedia, TooLarge
from proxy.intake.limits import Limits
from proxy.intake.reading import Reading
from proxy.media.addresses import Rules, networks
from proxy.media.costs import Costs
from proxy.media.fetching import Bounds, Fetching
from proxy.media.inlining import Inlining, Memory
from proxy.media.measuring import Measuring
from proxy.openai import Identity
from tests.fakes.media import chat, image, part
from tests.proxy.media.test_measuring import hosted, parts


async def ask(reading: Reading, body: Any) -> Job:
    return await reading.job(orjson.dumps(body), Api.CHAT, "id-1", Identity(b"a"), {"x-y": "z"})


async def read(body: Any, costs: Costs, **given: Any) -> Job:
    reading = Reading(costs, Limits(), **given)
    async with reading.running():
        return await ask(reading, body)


@pytest.mark.parametrize("size", [10, 1000])
async def test_a_request_is_read_with_its_identity_and_its_costs(size: int) -> None:
    """The larger one in a thread."""
    costs = Costs()
    for _ in range(200):
        costs.text.learn("tiny", 400, 200)
    job = await read(chat(part(image(size, size, "BMP")), text="x" * 400), costs)
    assert (job.id, job.fields) == ("id-1", "x-y: z\r\n")
    assert job.text_tokens == pytest.approx(200, rel=0.1)
    assert job.items[0].mm_hash != (await read(chat(part(image(size, size, "PNG"))), costs)).items[0].mm_hash


async def test_mistakes_are_told() -> None:
    with pytest.raises(BadRequest):
        await read({"messages": 3}, Costs())


async def test_urls_are_measured_where_that_is_asked_for() -> None:
    async with hosted() as host:
        body, costs = chat(*parts(f"{host.url}/x")), Costs()
        assert (await read(body, costs)).items[0].tokens == 1024 and host.asked == []
        measuring = Measuring(costs, 10.0, None)
        assert (await read(chat(), costs, measuring=measuring)).items == ()
        assert (await read(body, costs, measuring=measuring)).items[0].tokens == 1196


async def test_urls_are_fetched_where_that_is_asked_for_and_rules_may_change() -> None:
    async with hosted() as host:
        here = Rules(mode="fetch", networks=networks("127.0.0.0/8"))
        inlining = Inlining(Fetching(here, Bounds()), Memory(0, 10 << 20, 10 << 20), lambda: 0.0)
        reading = Reading(Costs(), Limits(rules=here), inlining=inlining)
        body = chat(*parts(f"{host.url}/typed"))
        async with reading.running():
            (item,) = (await ask(reading, body)).items
            assert item.mm_hash is not None and item.tokens == 1196
            reading.go_by(Limits(rules=Rules(mode="fetch")))
            with pytest.raises(ForbiddenMedia):
                await ask(reading, body)


@pytest.mark.parametrize("size", [1, 100_000])
async def test_limits_hold_wherever_a_request_is_parsed(size: int) -> None:
    body = chat(part(image()), part(image()), text="x" * size)
    reading = Reading(Costs(), Limits())
    assert len((await ask(reading, body)).items) == 2
    reading.go_by(Limits(items=1))
    with pytest.raises(TooLarge):
        await ask(reading, body)
