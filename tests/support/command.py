"""The proxy's command as a process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import aiohttp


@contextlib.asynccontextmanager
async def command(*argv: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The proxy as a process, and its first line on stdout."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *argv), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            yield process, (await process.stdout.readline()).decode()
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            async with http.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)
