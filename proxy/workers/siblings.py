"""One worker's word to another: a callback that reached the wrong one, a receipt that another keeps. No client and no
engine speaks here.

A unix socket for each worker, in a folder that only this user can enter. One question a connection:

    question    kind 1 │ length 4 │ body
    answer      status 2 │ length 4 │ body
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from enum import IntEnum
from pathlib import Path
from struct import Struct

from proxy.errors import NotFound

Answer = Callable[[bytes], Awaitable[tuple[int, bytes]]]
"""A status and a body for a body."""

_QUESTION = Struct("!BI")
_ANSWER = Struct("!HI")


class Kind(IntEnum):
    """What is asked."""

    CALLBACK = 0  # `callbacks`: a decode engine's call for a prefill
    RECEIPTS = 1  # `receipts`: what became of requests
    CIRCUITS = 2  # `standing`: which are not closed


class Siblings:
    """The workers of one proxy as `worker` sees them."""

    def __init__(self, folder: Path, workers: int, worker: int) -> None:
        self._folder = folder
        self.worker = worker
        self.others = tuple(other for other in range(workers) if other != worker)

    @asynccontextmanager
    async def listening(self, answers: Mapping[Kind, Answer]) -> AsyncIterator[None]:
        """Within, others get their answers from this worker."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                kind, length = _QUESTION.unpack(await reader.readexactly(_QUESTION.size))
                status, body = await answers[Kind(kind)](await reader.readexactly(length))
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

    async def ask(self, worker: int, kind: Kind, body: bytes) -> tuple[int, bytes]:
        """The answer of another worker, however long it takes. Raises NotFound if it dies before it answers."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._path(worker))
            try:
                writer.write(_QUESTION.pack(kind, len(body)) + body)
                status, length = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                return status, await reader.readexactly(length)
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            raise NotFound(f"worker {worker}, whose request this was, is no more", param="request_id") from None

    async def ask_all(self, kind: Kind, body: bytes, seconds: float) -> list[bytes]:
        """What the others answer with status 200, in their order; without those that do not within `seconds`."""
        answers = await asyncio.gather(*(self._within(seconds, other, kind, body) for other in self.others))
        return [answer for answer in answers if answer is not None]

    async def _within(self, seconds: float, worker: int, kind: Kind, body: bytes) -> bytes | None:
        try:
            async with asyncio.timeout(seconds):
                status, answer = await self.ask(worker, kind, body)
        except (TimeoutError, NotFound):
            return None
        return answer if status == 200 else None

    def _path(self, worker: int) -> str:
        return str(self._folder / f"{worker}.sock")
