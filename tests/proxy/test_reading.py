"""A request becomes a job, large or small, with all that was learnt."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.core import Api, Job
from proxy.costs import Costs
from proxy.errors import BadRequest
from proxy.measuring import Measuring
from proxy.openai import Identity
from proxy.reading import Reading
from tests.fakes.media import chat, image, part
from tests.proxy.test_measuring import hosted, parts


async def read(body: Any, costs: Costs, measuring: Measuring | None = None) -> Job:
    return await Reading(costs, measuring).job(orjson.dumps(body), Api.CHAT, "id-1", Identity(b"a"), {"x-y": "z"})


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
        measuring = Measuring(costs, 10.0, private=True)
        async with measuring.running():
            assert (await read(chat(), costs, measuring)).items == ()
            assert (await read(body, costs, measuring)).items[0].tokens == 1196
