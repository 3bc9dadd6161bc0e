"""A family that sees images in tiles and counts positions in one row: exact through every topology with an encoder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
import pytest_asyncio

from tests.support.cluster import Client, cluster
from tests.system.cases import CASES, MAX_TOKENS, Case
from tests.system.topologies import fronts

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

FAMILY = "internvl"
ENCODING = ("E+PD", "E+P+D push", "E+P+D pull")


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
