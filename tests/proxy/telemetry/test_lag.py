"""A loop that something held up is told of, one that was idle is not."""

from __future__ import annotations

import asyncio
import time

from proxy.telemetry import lag
from tests.support.waiting import until


async def test_whatever_holds_the_loop_up_is_seen() -> None:
    seen: list[float] = []
    watching = asyncio.create_task(lag.watch(seen.append))
    await until(lambda: bool(seen))
    time.sleep(0.6)  # noqa: ASYNC251 - longer than the watch sleeps: it is late by the rest, whenever it began
    count = len(seen)
    await until(lambda: len(seen) > count)
    watching.cancel()
    assert min(seen) >= 0.0 and seen[count] >= 0.3
