from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from engines.language.parallel.carrier import after, every, joined, parts_of
from engines.language.parallel.messages import Finish, Freed, Open, Publish, Question, Reserve
from engines.transfer.base import GoneError, LayoutMismatch, PeerFailed, TransferError
from tests.support.parallel_transfers import Side, refused, side
from tests.support.waiting import until

OURS, THEIRS = [(0, 16), (32, 16)], [(64, 32)]


@pytest_asyncio.fixture(params=[1, 2, 3], ids=["1 rank", "2 ranks", "3 ranks"])
async def sides(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Side, Side]]:
    async with AsyncExitStack() as stack:
        sender, receiver = [await stack.enter_async_context(side(request.param)) for _ in range(2)]
        sender.fill(10)
        yield sender, receiver


@pytest_asyncio.fixture
async def two() -> AsyncIterator[tuple[Side, Side]]:
    async with side(2) as sender, side(2) as receiver:
        sender.fill(10)
        yield sender, receiver


async def at_rest(*all_sides: Side) -> None:
    await until(lambda: not any(held for each in all_sides for held in each.held()))


def arrived(receiver: Side) -> bool:
    return all(
        bytes(arena.buffer[64:96]) == bytes([10 + rank]) * 32 and not any(arena.buffer[:64])
        for rank, arena in enumerate(receiver.arenas)
    )


@pytest.mark.asyncio
async def test_every_rank_pushes_to_its_own(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    freed: list[str] = []
    ticket = await receiver.carrier.reserve(
        receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: freed.append("receiver")
    )
    push = await sender.carrier.open(ticket.offer(), timeout=5.0)
    assert push.facts == {"num_blocks": 4}
    push.write(sender.arenas[0], OURS, THEIRS)
    sender.run_errands()
    await push.finish()
    await ticket.wait()
    assert arrived(receiver)
    ticket.release()
    ticket.release()
    push.release(lambda: freed.append("sender"))
    await until(lambda: sorted(freed) == ["receiver", "sender"])
    await at_rest(sender, receiver)


@pytest.mark.asyncio
async def test_every_rank_fetches_from_its_own(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    freed: list[str] = []
    where = await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: freed.append("sender"))
    ticket = await receiver.carrier.reserve(
        receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: freed.append("receiver")
    )
    await ticket.fetch(where)
    assert arrived(receiver)
    ticket.release()
    await until(lambda: sorted(freed) == ["receiver", "sender"])
    await at_rest(sender, receiver)
    assert not any(sender.carrier.audit().values())


@pytest.mark.asyncio
async def test_a_publication_counts_until_the_last_rank_has_freed_its_part(two: tuple[Side, Side]) -> None:
    sender, _ = two
    told: list[Freed] = []
    assert sender.links[0].rank is not None
    sender.links[0].rank._say = told.append
    await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: None)
    sender.carrier.withdraw("kv")
    await until(lambda: bool(told))
    assert sender.transfers[0].audit()["publications"] == 0
    assert sender.carrier.audit()["publications"] == 1
    sender.links[0].freed(told[0])
    assert not any(sender.carrier.audit().values())


@pytest.mark.asyncio
async def test_a_name_that_is_published_already_is_refused(two: tuple[Side, Side]) -> None:
    sender, _ = two
    await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: None)
    with pytest.raises(ValueError, match="kv"):
        await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: None)
    sender.carrier.withdraw("kv")
    await at_rest(sender)


@pytest.mark.asyncio
async def test_a_publication_that_is_withdrawn_is_gone_on_every_rank(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    freed: list[None] = []
    where = await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: freed.append(None))
    sender.carrier.withdraw("kv")
    sender.carrier.withdraw("kv")
    await until(lambda: len(freed) == 1)
    ticket = await receiver.carrier.reserve(receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: None)
    with pytest.raises(GoneError):
        await ticket.fetch(where)
    ticket.release()
    await at_rest(sender, receiver)


@pytest.mark.asyncio
async def test_a_push_that_is_aborted_fails_every_rank(sides: tuple[Side, Side]) -> None:
    sender, receiver = sides
    ticket = await receiver.carrier.reserve(receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: None)
    push = await sender.carrier.open(ticket.offer(), timeout=5.0)
    await push.abort("nobody wants it")
    with pytest.raises(PeerFailed, match="nobody wants it"):
        await ticket.wait()
    push.release(lambda: None)
    ticket.release()
    await at_rest(sender, receiver)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [Reserve, Open, Publish, Finish])
async def test_a_rank_that_fails_leaves_nothing_behind_on_the_others(two: tuple[Side, Side], kind: type) -> None:
    sender, receiver = two

    def fails(question: Question) -> None:
        if isinstance(question, kind):
            refused(question)

    for each in two:
        each.links[0].fails = fails
    with pytest.raises(TransferError, match="this rank will not"):
        where = await sender.carrier.publish("kv", sender.arenas[0], OURS, ttl=5.0, on_free=lambda: None)
        sender.carrier.withdraw("kv")
        assert len(where["ranks"]) == 2
        ticket = await receiver.carrier.reserve(receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: None)
        try:
            push = await sender.carrier.open(ticket.offer(), timeout=5.0)
            try:
                await push.finish()
            finally:
                push.release(lambda: None)
        finally:
            ticket.release()
    await at_rest(sender, receiver)


@pytest.mark.asyncio
async def test_a_write_that_fails_on_another_rank_fails_the_push(two: tuple[Side, Side]) -> None:
    sender, receiver = two
    ticket = await receiver.carrier.reserve(receiver.arenas[0], THEIRS, timeout=5.0, on_free=lambda: None)
    push = await sender.carrier.open(ticket.offer(), timeout=5.0)
    assert sender.links[0].rank is not None
    sender.links[0].rank.write(push.key, [(0, 16)], [(0, 16)], None, False)  # type: ignore[attr-defined]
    with pytest.raises(LayoutMismatch, match="outside the spans"):
        await push.finish()
    await push.abort("a rank failed")
    push.release(lambda: None)
    ticket.release()
    await at_rest(sender, receiver)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_is_refused(size: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"--tensor-parallel is {size} at the peer and 2 here"):
        parts_of(joined([{"nonce": str(rank)} for rank in range(size)]), 2)


@pytest.mark.parametrize("ranks", [None, 3, [1, 2], {}])
def test_a_handle_of_another_shape_is_refused(ranks: Any) -> None:
    with pytest.raises(LayoutMismatch, match="malformed"):
        parts_of({"ranks": ranks}, 2)


def test_the_handle_of_one_rank_is_that_ranks_own() -> None:
    assert parts_of(joined([{"nonce": "a"}]), 1) == [joined([{"nonce": "a"}])] == [{"nonce": "a"}]


def test_what_all_ranks_free_is_free_once() -> None:
    freed: list[None] = []
    call = after(2, lambda: freed.append(None))
    call()
    assert freed == []
    call()
    assert freed == [None]


@pytest.mark.asyncio
async def test_the_first_error_ends_the_others() -> None:
    ended = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise GoneError("gone")

    with pytest.raises(GoneError):
        await every([waits(), fails()])
    assert ended.is_set()
