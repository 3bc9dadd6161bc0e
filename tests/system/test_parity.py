"""Exact answers: every topology says what one `transformers` model says, token by token.

One encoder, one prefill, one decode and one combined engine serve each family; a proxy per topology stands in front of
them. Topologies without an encoder get embeddings that the test has had encoded itself, through a proxy that is told to
trust them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.support.checkpoints import FAMILIES
from tests.support.cluster import Answer, Client, Cluster, cluster
from tests.system.cases import CASES, MAX_TOKENS, Case
from tests.system.topologies import TOPOLOGIES, fronts
from tests.system.videos import VIDEOS, VideoCase, check

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

ROUTES = {
    "both": "PD",
    "P+D push": "P-D",
    "P+D pull": "P-D",
    "E+PD": "E-PD",
    "E+P+D push": "E-P-D",
    "E+P+D pull": "E-P-D",
}


@dataclass
class Family:
    """The engines of one model family and a proxy per topology."""

    name: str
    engines: Cluster
    proxies: Mapping[str, Client]

    async def ask(self, topology: str, case: Case, **fields: Any) -> Answer:
        fields = {"max_tokens": MAX_TOKENS, **fields}
        if case.images and not topology.startswith("E"):
            return await self._ask_with_embeddings(self.proxies[topology], case, fields)
        return await self.proxies[topology].chat(case.content, **fields)

    async def _ask_with_embeddings(self, proxy: Client, case: Case, fields: dict[str, Any]) -> Answer:
        """Encode first, then send handles, as a client of a deployment without encoders would."""
        assert isinstance(case.content, list)
        images = [part for part in case.content if part["type"] == "image_url"]
        encoder = self.engines.client(self.engines.engine("encode"))
        handles = (await encoder.chat(images)).body["ec_transfer_params"]
        by_index = {index: (mm_hash, entry) for mm_hash, entry in handles.items() for index in entry["item_indices"]}
        content, index = [], 0
        for part in case.content:
            if part["type"] == "image_url":
                mm_hash, entry = by_index[index]
                part = {"type": "image_embeds", "image_embeds": entry["metadata"], "uuid": mm_hash}
                index += 1
            content.append(part)
        return await proxy.chat(content, ec_transfer_params=handles, **fields)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def family(request: pytest.FixtureRequest) -> AsyncIterator[Family]:
    async with cluster(request.param, "1e1p1d") as engines, fronts(engines, TOPOLOGIES) as proxies:
        yield Family(request.param, engines, proxies)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("topology", TOPOLOGIES)
async def test_every_topology_equals_the_reference(family: Family, topology: str, case: Case) -> None:
    whole = await family.ask(topology, case)
    streamed = await family.ask(topology, case, stream=True, stream_options={"include_usage": True})
    assert whole.status == streamed.status == 200, (whole.error, streamed.error)
    assert whole.text == case.expected(family.name)
    assert streamed.text == whole.text
    assert streamed.done
    assert streamed.events[-1]["usage"] == whole.body["usage"]
    route = ROUTES[topology] if case.images else ROUTES[topology].removeprefix("E-")
    assert whole.headers["x-triptych-route"].split(";")[0] == route


@pytest.mark.parametrize("case", VIDEOS, ids=lambda case: case.name)
async def test_videos_too(family: Family, case: VideoCase) -> None:
    await check(family.name, family.proxies, case)


async def test_many_at_once_say_what_each_says_alone(family: Family) -> None:
    asked = [(topology, case) for case in CASES for topology in ("E+PD", "E+P+D push", "E+P+D pull", "P+D push")]
    answers = await asyncio.gather(
        *(family.ask(topology, case, stream=bool(n % 2)) for n, (topology, case) in enumerate(asked))
    )
    assert len(asked) >= 16
    for (topology, case), answer in zip(asked, answers, strict=True):
        assert answer.text == case.expected(family.name), (topology, case.name, answer.error)


async def test_nothing_is_held_afterwards(family: Family) -> None:
    await family.engines.idle()


@pytest.mark.parametrize("transport", ["mooncake", "zmq", "storage"])
async def test_every_transport_equals_the_reference(transport: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`shm` is the transport of all other tests here; `storage` carries embeddings, and shm the KV."""
    if transport == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake or its system libraries are not installed")
    storage = ("--storage-path", str(tmp_path_factory.mktemp("embeddings"))) if transport == "storage" else ()
    async with cluster("qwen3_vl", "1e1p1d", transfer=transport, engine_arguments=storage) as deployment:
        for case in CASES:
            answer = await deployment.chat(case.content, max_tokens=MAX_TOKENS)
            assert answer.status == 200, answer.error
            assert answer.text == case.expected("qwen3_vl"), case.name
        await deployment.idle()
