"""A family that sees images in tiles and counts positions in one row: exact through every topology with an encoder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
import pytest_asyncio

from tests.support.cluster import Client, cluster
from tests.system.cases import CASES, MAX_TOKENS, Case
from tests.system.topologies import fronts
from tests.system.videos import ENCODING, VIDEOS, VideoCase, check

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

FAMILY = "internvl"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxies() -> AsyncIterator[Mapping[str, Client]]:
    async with cluster(FAMILY, "1e1p1d") as engines, fronts(engines, ENCODING) as proxies:
        yield proxies
        await engines.idle()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("topology", ENCODING)
async def test_every_topology_equals_the_reference(proxies: Mapping[str, Client], topology: str, case: Case) -> None:
    answer = await proxies[topology].chat(case.content, max_tokens=MAX_TOKENS)
    assert answer.status == 200, answer.error
    assert answer.text == case.expected(FAMILY)


@pytest.mark.parametrize("case", VIDEOS, ids=lambda case: case.name)
async def test_videos_too(proxies: Mapping[str, Client], case: VideoCase) -> None:
    await check(FAMILY, proxies, case)


async def test_what_no_model_hears_is_refused_with_the_reason(proxies: Mapping[str, Client]) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    answer = await proxies["E+P+D push"].chat([{"type": "text", "text": "Listen."}, sound])
    assert answer.status == 400 and answer.error is not None
    assert answer.error["code"] == "unsupported_modality"
    assert "none of its models has audio" in answer.error["message"]
    assert answer.error["param"] == "messages[0].content[1]"
