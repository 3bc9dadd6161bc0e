from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.language.embedding_pool import EmbeddingPool, Run, size, split


def test_runs_are_split_without_loss() -> None:
    assert split([(0, 3), (7, 2)], 4) == ([(0, 3), (7, 1)], [(8, 1)])
    assert split([(0, 3)], 9) == ([(0, 3)], [])
    assert split([], 1) == ([], [])


async def test_blocks_come_in_one_run_where_there_is_one() -> None:
    pool = EmbeddingPool(8, spare=0)
    claim = pool.claim()
    assert await pool.take(claim, 2, 2) == [(0, 2)]
    assert await pool.take(claim, 3, 3) == [(2, 3)]
    pool.give_back([(0, 2)])
    assert await pool.take(claim, 3, 3) == [(5, 3)]
    assert await pool.take(claim, 1, 9) == [(0, 2)]
    pool.give_back([(1, 1)])
    pool.give_back([(3, 1), (6, 1)])
    assert await pool.take(claim, 2, 2) == [(1, 1), (3, 1)]
    pool.check()
    assert pool.free == 1


async def test_what_is_free_cannot_be_given_back() -> None:
    pool = EmbeddingPool(4, spare=0)
    await pool.take(pool.claim(), 2, 2)
    with pytest.raises(RuntimeError, match="given back twice"):
        pool.give_back([(1, 2)])
    with pytest.raises(RuntimeError, match="given back twice"):
        pool.give_back([(0, 1), (0, 1)])
    assert pool.free == 2
    pool.check()
    pool.free = 3
    with pytest.raises(RuntimeError, match="not 3 of 4 blocks"):
        pool.check()


async def test_the_spare_is_for_the_oldest_that_runs() -> None:
    pool = EmbeddingPool(4, spare=1)
    queued, young, old = pool.claim(), pool.claim(), pool.claim()
    pool.start(old)
    pool.start(young)
    held = await pool.take(queued, pool.usable, pool.usable)
    waiting = [asyncio.create_task(pool.take(claim, 1, 4)) for claim in (queued, young)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    assert await pool.take(old, 1, 4) == [(3, 1)]
    pool.close(old)
    pool.give_back([(3, 1)])
    assert await waiting[1] == [(3, 1)], "it is the oldest now"
    pool.give_back(held)
    assert size(await waiting[0]) == 2


async def test_who_becomes_the_oldest_that_runs_gets_the_spare_at_once() -> None:
    pool = EmbeddingPool(4, spare=2)
    old, young = pool.claim(), pool.claim()
    await pool.take(old, 2, 2)
    waiting = [asyncio.create_task(pool.take(claim, 1, 1)) for claim in (old, young)]
    await asyncio.sleep(0)
    pool.start(old)
    assert await waiting[0] == [(2, 1)], "it runs"
    pool.start(young)
    await asyncio.sleep(0)
    assert not waiting[1].done()
    pool.close(old)
    assert await waiting[1] == [(3, 1)], "the other needs no more"


async def test_those_that_run_are_served_before_those_that_are_queued_and_nobody_overtakes() -> None:
    pool = EmbeddingPool(6, spare=1)
    first, second, third, running = (pool.claim() for _ in range(4))
    held = await pool.take(first, 5, 5)
    order: list[str] = []

    async def want(name: str, claim: object, count: int) -> list[Run]:
        runs = await pool.take(claim, count, count)  # type: ignore[arg-type]
        order.append(name)
        return runs

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(want("second", second, 3)), group.create_task(want("third", third, 1))]
        await asyncio.sleep(0)
        pool.start(running)
        tasks.append(group.create_task(want("running", running, 3)))
        await asyncio.sleep(0)
        for block in range(5):
            pool.give_back([(block, 1)])
            await asyncio.sleep(0)
            assert "third" not in order
        pool.give_back(await tasks[2])
    assert held == [(0, 5)]
    assert order == ["running", "second", "third"]


async def test_who_leaves_takes_nothing_and_makes_way() -> None:
    pool = EmbeddingPool(3, spare=1)
    held = await pool.take(pool.claim(), 1, 1)
    large = asyncio.create_task(pool.take(pool.claim(), 2, 2))
    small = asyncio.create_task(pool.take(pool.claim(), 1, 1))
    await asyncio.sleep(0)
    assert not small.done()
    large.cancel()
    assert await small == [(1, 1)]
    late = asyncio.create_task(pool.take(pool.claim(), 1, 1))
    await asyncio.sleep(0)
    pool.give_back(held)
    late.cancel()  # it has been served, and does not know yet
    await asyncio.gather(late, return_exceptions=True)
    assert late.cancelled()
    assert pool.free == 2
    pool.check()


@given(st.integers(0, 2**32))
def test_no_two_requests_wait_for_each_other(seed: int) -> None:
    asyncio.run(asyncio.wait_for(_run(random.Random(seed)), 10))


async def _run(dice: random.Random) -> None:
    """Requests whose prompts run in few slots, oldest first, and which hold blocks while they wait for one."""
    capacity = dice.randrange(2, 12)
    pool = EmbeddingPool(capacity, spare=dice.randrange(1, 1 + max(1, capacity // 3)))
    slots = asyncio.Semaphore(dice.randrange(1, 3))

    async def request(first: int, rest: int) -> None:
        claim = pool.claim()
        held = await pool.take(claim, first, first)
        await asyncio.sleep(0)
        async with slots:
            pool.start(claim)
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
            while rest:
                if dice.random() < 0.5:
                    pool.give_back(held)  # computed
                    held = []
                new = await pool.take(claim, 1, rest) if not held else []
                rest -= size(new)
                held += new
                await asyncio.sleep(0)
            pool.close(claim)
            await asyncio.sleep(0)
        pool.give_back(held)

    await asyncio.gather(*(request(dice.randrange(1, pool.usable + 1), dice.randrange(20)) for _ in range(8)))
    assert pool.free == pool.capacity
    pool.check()
