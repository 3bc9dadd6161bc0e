"""Prompts that begin alike: the same answers, through every topology, and less to compute."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from deploy.processes import Child
from tests.support.cluster import CHUNK, Client, Cluster, cluster
from tests.support.pictures import image_file
from tests.system.cases import LONG, MAX_TOKENS, TALL, WIDE, Case
from tests.system.topologies import fronts
from tests.system.videos import VIDEOS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

FAMILY = "qwen3_vl"
CACHING = ("--max-batched-tokens", str(CHUNK), "--kv-blocks", "96")  # room for two of these prompts, not for all
COMPUTING = {"E+PD": "both", "E+P+D push": "prefill", "E+P+D pull": "prefill"}
OTHER = image_file(320, 160, seed=9)
CASES = (
    Case("an image and a long text", (WIDE, LONG, "Where does it end?")),
    Case("the same and another question", (WIDE, LONG, "Where does it begin?")),
    Case("another image of the same size", (OTHER, LONG, "Where does it end?")),
    Case("the first image, and one more", (WIDE, LONG, TALL, "Compare them.")),
    Case("text alone", (LONG, "Where does it end?")),
)


@dataclass
class Fleet:
    engines: Cluster
    proxies: Mapping[str, Client]

    async def cached(self, engine: Child) -> float:
        """Tokens of prompts that it has not computed because they were there."""
        text = await self.engines.client(engine).text("/metrics")
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == "triptych_tokens_total" and s.labels["kind"] == "cached")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    roles = dict.fromkeys(("prefill", "decode", "both"), CACHING)
    async with cluster(FAMILY, "1e1p1d", role_arguments=roles) as engines, fronts(engines, COMPUTING) as proxies:
        yield Fleet(engines, proxies)


@pytest.mark.parametrize("topology", COMPUTING)
async def test_what_was_computed_before_is_not_computed_again_and_answers_are_exact(
    fleet: Fleet, topology: str
) -> None:
    engine = fleet.engines.engine(COMPUTING[topology])
    before = await fleet.cached(engine)
    for case in (*CASES, *CASES):
        answer = await fleet.proxies[topology].chat(case.content, max_tokens=12)
        assert answer.text == case.expected(FAMILY), case.name
    assert await fleet.cached(engine) - before > 500
    await fleet.engines.idle()


async def test_a_video_that_was_computed_before_is_not_computed_again(fleet: Fleet) -> None:
    before = await fleet.cached(fleet.engines.engine("prefill"))
    for case in (VIDEOS[0], VIDEOS[2], VIDEOS[0]):  # the second begins with the video of the first
        answer = await fleet.proxies["E+P+D pull"].chat(case.content, max_tokens=MAX_TOKENS)
        assert answer.text == case.expected(FAMILY), case.name
    assert await fleet.cached(fleet.engines.engine("prefill")) > before
