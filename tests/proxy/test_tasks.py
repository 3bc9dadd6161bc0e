"""Sibling tasks: the first failure comes out as itself and ends the others."""

import asyncio

import pytest

from proxy.tasks import together


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
