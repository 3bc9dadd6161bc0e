"""Sibling tasks: the first failure comes out as itself and ends the others."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest

from proxy.tasks import Owed, end_if_cancelled, race, together


async def test_the_first_failure_is_raised_itself_and_cancels_the_rest() -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def fails() -> None:
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        async with together() as group:
            group.create_task(waits())
            group.create_task(fails())
            await asyncio.Event().wait()
    assert ended == ["cancelled"]


async def test_nested_groups_do_not_wrap() -> None:
    with pytest.raises(ValueError, match="deep"):
        async with together(), together():
            raise ValueError("deep")


async def slow() -> str:
    await asyncio.Event().wait()
    return "never"


async def says(word: str) -> str:
    return word


async def breaks(word: str) -> str:
    raise KeyError(word)


async def after(event: asyncio.Event, runner: Coroutine[Any, Any, str]) -> str:
    await event.wait()
    return await runner


@pytest.mark.parametrize("second_wins", [False, True])
async def test_a_race_has_one_winner_and_the_loser_is_cancelled(second_wins: bool) -> None:
    go, ended = asyncio.Event(), []

    async def loser() -> str:
        try:
            return await slow()
        finally:
            ended.append("cancelled")

    def second() -> Coroutine[Any, Any, str]:
        go.set()
        return says("second") if second_wins else loser()

    first = loser() if second_wins else after(go, says("first"))
    assert await race(first, second, 0.01, KeyError) == ("second" if second_wins else "first")
    assert ended == ["cancelled"]


async def test_a_quick_first_has_no_rival_and_fails_at_once() -> None:
    def never() -> None:
        raise AssertionError

    assert await race(says("first"), never, 10.0, KeyError) == "first"
    with pytest.raises(KeyError, match="first"):
        await race(breaks("first"), never, 10.0, KeyError)


async def test_one_failure_waits_for_the_other() -> None:
    go = asyncio.Event()
    assert await race(after(go, says("first")), lambda: _opens(go, breaks("second")), 0.01, KeyError) == "first"
    go = asyncio.Event()
    with pytest.raises(KeyError, match="first"):
        await race(after(go, breaks("first")), lambda: _opens(go, breaks("second")), 0.01, KeyError)


def _opens(go: asyncio.Event, runner: Coroutine[Any, Any, str]) -> Coroutine[Any, Any, str]:
    go.set()
    return runner


async def test_without_a_rival_the_first_is_waited_for() -> None:
    go = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, go.set)
    assert await race(after(go, says("first")), lambda: None, 0.01, KeyError) == "first"


async def test_who_cancels_a_race_cancels_both() -> None:
    started = asyncio.Event()

    def second() -> Coroutine[Any, Any, str]:
        started.set()
        return slow()

    racing = asyncio.create_task(race(slow(), second, 0.01, KeyError))
    await started.wait()
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing


async def test_what_is_owed_is_finished_though_nobody_waits() -> None:
    owed, go, ended = Owed(), asyncio.Event(), []

    async def work(fails: bool = False) -> int:
        await go.wait()
        ended.append(fails)
        if fails:
            raise KeyError("nobody hears it")
        return 7

    waiting = asyncio.create_task(owed.finish(work()))
    leaving = [asyncio.create_task(owed.finish(work(fails))) for fails in (False, True)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    assert len(owed) == 3 and not ended
    go.set()
    assert await waiting == 7
    await asyncio.sleep(0)
    assert sorted(ended) == [False, False, True] and not len(owed)


async def test_who_has_not_left_hears_the_failure() -> None:
    async def fails() -> None:
        raise KeyError("told")

    with pytest.raises(KeyError, match="told"):
        await Owed().finish(fails())


async def test_what_is_owed_can_be_stopped() -> None:
    owed = Owed()
    waiting = asyncio.create_task(owed.finish(asyncio.Event().wait()))
    await asyncio.sleep(0)
    await owed.stop()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not len(owed)


async def test_a_cancellation_that_was_swallowed_still_ends_the_task() -> None:
    async def deaf() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def runs() -> None:
        await deaf()
        end_if_cancelled()
        pytest.fail("it went on")

    end_if_cancelled()
    task = asyncio.create_task(runs())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=1)
    assert task.cancelled()
