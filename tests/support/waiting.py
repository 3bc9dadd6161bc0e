"""Waiting for what other processes do, with a deadline."""

import asyncio
from collections.abc import Awaitable, Callable


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Return once `condition()` is true.

    :raises TimeoutError: it was not within `seconds`.
    """
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def eventually(condition: Callable[[], Awaitable[object]], seconds: float = 10.0) -> None:
    """`until` for a condition that has to ask somebody. The last answer is named when time is up."""
    answer: object = None
    try:
        async with asyncio.timeout(seconds):
            while not (answer := await condition()):
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimeoutError(f"still {answer!r} after {seconds} s") from None
