"""Places: all of what one needs or nothing, in the order of asking, and given back whatever happens."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from proxy.places import NO_PLACES, Places


async def rest() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_who_needs_several_waits_for_all_and_nobody_overtakes() -> None:
    places = Places(3)
    first = await places.take(2)
    large = asyncio.create_task(places.take(3))
    await rest()
    small = asyncio.create_task(places.take(1))
    await rest()
    assert repr(places) == "<Places 1 of 3 free, 2 waiting>"
    first.leave()
    await rest()
    assert not large.done() and not small.done()
    first.leave()
    first.leave()  # nothing is left to give
    with await large:
        await rest()
        assert not small.done()
    with await small:
        assert repr(places) == "<Places 2 of 3 free, 0 waiting>"
    assert places.free == 3


async def test_more_than_there_are_is_all_there_are() -> None:
    places = Places(2)
    with await places.take(40) as taken:
        assert places.free == 0
        for _ in range(40):
            taken.leave()
        assert places.free == 2
    assert places.free == 2


@pytest.mark.parametrize("granted", [False, True])
async def test_one_who_leaves_the_queue_keeps_nothing(granted: bool) -> None:
    places = Places(2)
    taken = await places.take(2)
    leaving = asyncio.create_task(places.take(2))
    await rest()
    behind = asyncio.create_task(places.take(1))
    await rest()
    if granted:
        taken.leave()
        taken.leave()
        leaving.cancel()
    else:
        leaving.cancel()
        taken.leave()
        taken.leave()
    with suppress(asyncio.CancelledError):
        await leaving
    with await behind:
        assert (places.free, places.waiting) == (1, 0)


def test_no_limit_is_no_place() -> None:
    with NO_PLACES as none:
        none.leave()
