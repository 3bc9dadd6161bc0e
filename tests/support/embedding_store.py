"""A real embedding store on loopback: Mooncake's master and a little memory, in a process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.processes import Child, StartError

STORE_BYTES = 64 << 20


@asynccontextmanager
async def store_server(*flags: str) -> AsyncIterator[Child]:
    """Its master is at `address(child)`. Skips the test where Mooncake cannot be loaded."""
    server = Child("store", "engines.store", ["--port", "0", "--bytes", str(STORE_BYTES), *flags])
    try:
        await server.start(30)
    except StartError as error:
        if "Mooncake" in str(error):
            pytest.skip(str(error))
        raise
    try:
        yield server
    finally:
        await server.stop()


def address(server: Child) -> str:
    return server.url.removeprefix("tcp://")
