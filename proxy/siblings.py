"""One worker's word to another: a callback that reached the wrong one. No client and no engine speaks here.

A unix socket for each worker, in a folder that only this user can enter. One question a connection:

    question    length 4 │ body
    answer      status 2 │ length 4 │ body
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from struct import Struct

from proxy.errors import NotFound

Answer = Callable[[bytes], Awaitable[tuple[int, bytes]]]

_QUESTION = Struct("!I")
_ANSWER = Struct("!HI")


class Siblings:
    """The workers of one proxy as `worker` sees them."""

    def __init__(self, folder: Path, workers: int, worker: int) -> None:
        self._folder = folder
        self.worker = worker
        self.others = tuple(other for other in range(workers) if other != worker)

    @asynccontextmanager
    async def listening(self, answer: Answer) -> AsyncIterator[None]:
        """Within, `answer` is what others get from this worker: a status and a body for each body."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                (length,) = _QUESTION.unpack(await reader.readexactly(_QUESTION.size))
                status, body = await answer(await reader.readexactly(length))
                writer.write(_ANSWER.pack(status, len(body)) + body)
                await writer.drain()
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the one who asked has died or given up
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, self._path(self.worker))
        try:
            yield
        finally:
            server.close()

    async def ask(self, worker: int, body: bytes) -> tuple[int, bytes]:
        """The answer of another worker, however long it takes. Raises NotFound if it dies before it answers."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._path(worker))
            try:
                writer.write(_QUESTION.pack(len(body)) + body)
                status, length = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                return status, await reader.readexactly(length)
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            raise NotFound(f"worker {worker}, whose request this was, is no more", param="request_id") from None

    def _path(self, worker: int) -> str:
        return str(self._folder / f"{worker}.sock")
