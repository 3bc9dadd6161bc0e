"""The proxy's part in a decode-first push: lets D's call for prefill become a request to P, under the test's eyes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Handle = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]


@asynccontextmanager
async def metaserver(handle: Handle) -> AsyncIterator[str]:
    """Serve `handle(descriptor) -> (status, body)`; yields the URL that D is to call."""

    async def answer(request: web.Request) -> web.Response:
        status, body = await handle(await request.json())
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/v1/metaserver", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/metaserver"
    finally:
        await runner.cleanup()
