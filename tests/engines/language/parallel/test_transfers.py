"""One rank's side alone; a whole engine's is in `test_carrier`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.language.parallel.messages import (
    Abort,
    Freed,
    Open,
    Ping,
    Publish,
    Release,
    Reserve,
    packed_spans,
)
from engines.language.parallel.transfers import RankTransfers
from engines.transfer import create
from engines.transfer.base import Transfer
from tests.support.parallel_transfers import NBYTES
from tests.support.waiting import until

SPANS = packed_spans([(0, 16)])


class Rank:
    def __init__(self, transfer: Transfer) -> None:
        self.said: list[Freed] = []
        self.transfer = transfer
        self.transfers = RankTransfers(transfer, transfer.allocate("kv", NBYTES), self.said.append)

    async def at_rest(self, *keys: int) -> None:
        """These keys are free, and nothing is held."""
        await until(lambda: {freed.key for freed in self.said} == set(keys) and not any(self.transfer.audit().values()))
        assert repr(self.transfers) == "<RankTransfers 0 tickets, 0 pushes, 0 published>"


@pytest_asyncio.fixture
async def rank() -> AsyncIterator[Rank]:
    transfer = create("memory", timeout=2.0)
    rank = Rank(transfer)
    await transfer.start()
    yield rank
    await rank.transfers.close()
    await transfer.close()


@pytest.mark.asyncio
async def test_what_rank_0_releases_is_free(rank: Rank) -> None:
    offer = await rank.transfers.answer(Reserve(1, SPANS, 5.0))
    assert offer is not None
    where = await rank.transfers.answer(Publish(2, "kv", SPANS, 5.0))
    assert where is not None
    assert where["key"] == "kv"
    assert rank.said == []
    await rank.transfers.answer(Release(1))
    await rank.transfers.answer(Release(2))
    await rank.at_rest(1, 2)


@pytest.mark.asyncio
async def test_a_push_that_is_released_early_is_aborted_first(rank: Rank) -> None:
    offer = await rank.transfers.answer(Reserve(1, SPANS, 5.0))
    assert offer is not None
    await rank.transfers.answer(Open(2, offer, 5.0))
    await rank.transfers.answer(Release(2))
    await rank.transfers.answer(Release(1))
    await rank.at_rest(1, 2)


@pytest.mark.asyncio
async def test_a_write_to_a_push_that_is_over_is_left_out(rank: Rank) -> None:
    offer = await rank.transfers.answer(Reserve(1, SPANS, 5.0))
    assert offer is not None
    await rank.transfers.answer(Open(2, offer, 5.0))
    await rank.transfers.answer(Abort(2, "enough"))
    rank.transfers.write(2, [(0, 16)], [(0, 16)], None, False)
    await rank.transfers.answer(Release(2))
    rank.transfers.write(2, [(0, 16)], [(0, 16)], None, False)
    await rank.transfers.answer(Release(1))
    await rank.at_rest(1, 2)


@pytest.mark.asyncio
async def test_what_never_came_to_be_is_free(rank: Rank) -> None:
    await rank.transfers.answer(Release(7))
    await rank.at_rest(7)


@pytest.mark.asyncio
async def test_nothing_is_published_or_free_before_its_copies_are_over(rank: Rank) -> None:
    copied: list[str] = []
    rank.transfers.staged(lambda: copied.append("for the publication"))
    await rank.transfers.answer(Publish(1, "kv", SPANS, 5.0))
    assert copied == ["for the publication"]
    rank.transfers.staged(lambda: copied.append("before it is free"))
    await rank.transfers.answer(Release(1))
    await rank.at_rest(1)
    assert copied == ["for the publication", "before it is free"]


@pytest.mark.asyncio
async def test_other_questions_are_not_for_it(rank: Rank) -> None:
    with pytest.raises(TypeError, match="Ping is no question about transfers"):
        await rank.transfers.answer(Ping())
