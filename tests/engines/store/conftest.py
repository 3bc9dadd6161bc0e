"""A store for all tests of a file, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from deploy.processes import Child
from engines.store import link
from tests.support.embedding_store import store_server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Child]:
    async with store_server() as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(link, "PATIENCE", 0.5)
