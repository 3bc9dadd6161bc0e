"""Lines of the access log: when and who, in batches, and none lost at the end."""

from __future__ import annotations

import asyncio
import io
import os
import re

from proxy.access import AccessLog


async def test_lines_are_written_together_soon() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    log.write("one")
    log.write("two")
    assert stream.getvalue() == ""
    async with asyncio.timeout(10):
        while not stream.getvalue():
            await asyncio.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["one", "two"]
    stamp = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {os.getpid()} INFO proxy.access "
    assert all(re.match(stamp, line) for line in lines)


async def test_many_lines_do_not_wait_and_the_last_ones_are_flushed() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    for number in range(300):
        log.write(str(number))
    assert stream.getvalue().count("\n") == 256
    log.flush()
    log.flush()
    assert [line.rpartition(" ")[2] for line in stream.getvalue().splitlines()] == [str(n) for n in range(300)]


def test_without_a_stream_nothing_is_kept() -> None:
    log = AccessLog(None)
    log.write("no loop is needed")
    log.flush()
