"""HTTP to engines: one session, one edge where aiohttp's errors become ours. Decides nothing and retries nothing."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import aiohttp

from proxy.core import Instance, Stage
from proxy.errors import Broken, Refused, StageTimeout, Unreachable

# An idle connection is closed by us before uvicorn (5 s) does: a POST on a connection that the engine is closing
# fails, and must not be repeated blindly.
_KEEPALIVE_S = 2.5
_ERROR_LIMIT = 1 << 20
_CHUNK = 1 << 18
_LARGE = 1 << 20  # aiohttp writes larger bodies in pieces only if they come as a file


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The patience of each stage, in seconds."""

    connect: float
    encode: float
    prefill: float
    first_token: float
    stream_idle: float
    answer: float


class Answer:
    """An engine's answer with status 200, being read."""

    def __init__(self, response: aiohttp.ClientResponse, stage: Stage, instance: Instance) -> None:
        self._response = response
        self._stage = stage
        self._instance = instance

    @property
    def content_type(self) -> str:
        return self._response.headers.get("Content-Type", "")

    async def read(self) -> bytes:
        """The whole body. Raises Broken."""
        with _edge(self._stage, self._instance):
            return await self._response.read()

    async def chunk(self) -> bytes:
        """The next bytes as they arrived; empty at the end. Raises Broken."""
        with _edge(self._stage, self._instance):
            return await self._response.content.readany()


class Upstream:
    """The one client session. `async with` opens and closes it."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def post(
        self, instance: Instance, stage: Stage, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[Answer]:
        """Send `body`; yields once the engine has answered with status 200. Leaving early closes the connection.

        Raises Unreachable, Broken, Refused.
        """
        with _edge(stage, instance):
            response = await self._open.post(
                instance.url + path,
                data=body if len(body) < _LARGE else io.BytesIO(body),
                headers={**headers, "Content-Type": "application/json"},
                allow_redirects=False,
            )
        async with response:
            if response.status != 200:
                said = await _some(response, stage, instance)
                raise Refused(response.status, said, stage=stage, retry_after=response.headers.get("Retry-After"))
            yield Answer(response, stage, instance)

    async def get(self, instance: Instance, path: str, timeout: float) -> tuple[int, bytes]:
        """(status, body) of a small answer. Raises Unreachable, Broken, StageTimeout."""
        async with deadline(timeout, Stage.PROXY, instance):
            with _edge(Stage.PROXY, instance):
                async with self._open.get(instance.url + path, allow_redirects=False) as response:
                    return response.status, await response.read()

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the session opens with `async with upstream`")
        return self._session


@asynccontextmanager
async def deadline(seconds: float | None, stage: Stage, instance: Instance) -> AsyncIterator[asyncio.Timeout]:
    """The end of a stage's patience, which the caller may reschedule. Raises StageTimeout."""
    try:
        async with asyncio.timeout(seconds) as timer:
            yield timer
    except TimeoutError:
        if not timer.expired():
            raise
        raise StageTimeout(f"{_who(stage, instance)} did not answer in time", stage=stage) from None


async def _some(response: aiohttp.ClientResponse, stage: Stage, instance: Instance) -> bytes:
    """An error answer's body, up to a limit; a body that breaks off still leaves the status to tell."""
    read = bytearray()
    try:
        while len(read) < _ERROR_LIMIT and (chunk := await response.content.read(_CHUNK)):
            read += chunk
    except aiohttp.ClientError:
        pass
    return bytes(read)


@contextmanager
def _edge(stage: Stage, instance: Instance) -> Iterator[None]:
    who = _who(stage, instance)
    try:
        yield
    except aiohttp.ConnectionTimeoutError:
        raise Unreachable(f"{who} did not accept a connection in time", stage=stage) from None
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(f"{who} cannot be reached: {os.strerror(error.os_error.errno or 0)}", stage=stage) from None
    except aiohttp.ClientPayloadError:
        raise Broken(f"{who} broke off in the middle of its answer", stage=stage) from None
    except aiohttp.ServerDisconnectedError:
        raise Broken(f"{who} closed the connection without an answer", stage=stage) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Broken(f"{who} failed: {type(error).__name__}: {error}", stage=stage) from None


def _who(stage: Stage, instance: Instance) -> str:
    return f"the {instance.role.label if stage is Stage.PROXY else stage} engine {instance.netloc}"
