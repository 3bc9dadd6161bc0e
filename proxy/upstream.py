"""HTTP to engines: one client, one edge where its errors become ours. Decides nothing and retries nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from proxy.core import Instance, Stage
from proxy.errors import Broken, EngineFailed, Refused, StageTimeout, Unreachable
from proxy.http.client import Client, ConnectFailed, Cut, Exchange, Feed, Shortcut
from proxy.http.message import JSON, Buffer

_ERROR_LIMIT = 1 << 20


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
    """An engine's answer with status 200, being read: whole, in chunks, or piped."""

    __slots__ = ("_exchange", "_instance", "_stage", "content_type")

    def __init__(self, exchange: Exchange, stage: Stage, instance: Instance) -> None:
        self._exchange = exchange
        self._stage = stage
        self._instance = instance
        self.content_type: str = exchange.headers.get("content-type", "")

    @property
    def done(self) -> bool:
        """All of it has arrived."""
        return self._exchange.done

    async def read(self) -> bytes:
        """The whole body. Raises Broken."""
        try:
            return await self._exchange.read()
        except Cut as error:
            raise _named(error, self._stage, self._instance) from None

    async def chunk(self) -> bytes:
        """The next bytes as they arrived; empty at the end. Raises Broken."""
        try:
            return await self._exchange.chunk()
        except Cut as error:
            raise _named(error, self._stage, self._instance) from None

    def pipe(self, feed: Feed, broken: Callable[[EngineFailed], None], shortcut: Shortcut | None = None) -> None:
        """Call `feed` with each piece in the moment it arrives, and with an empty one at the end.

        If the answer breaks off, `broken` is called instead of that. `shortcut` may take whole chunks unread.
        """
        self._exchange.pipe(feed, lambda error: broken(_named(error, self._stage, self._instance)), shortcut)

    async def end(self) -> None:
        """Wait until the answer is whole. Raises Broken."""
        try:
            await self._exchange.end()
        except Cut as error:
            raise _named(error, self._stage, self._instance) from None

    def enough(self) -> None:
        """What may still come is of no interest: the connection reads it by itself, and is then free again."""
        self._exchange.enough = True

    def pause(self) -> None:
        """Take no more from the engine for now."""
        self._exchange.pause()

    def resume(self) -> None:
        self._exchange.resume()


class Upstream:
    """All connections to engines. `async with` opens and closes them."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self._client = Client(timeouts.connect)

    def __repr__(self) -> str:
        return f"<Upstream {self._client!r}>"

    async def __aenter__(self) -> Upstream:
        self._client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def post(
        self,
        instance: Instance,
        stage: Stage,
        path: str,
        body: Buffer | list[Buffer],
        headers: Mapping[str, str],
    ) -> Post:
        """Send `body`, whole or in pieces; `async with` gives the Answer once the engine answered with status 200.

        Leaving before its end closes the connection. Raises Unreachable, Broken, Refused.
        """
        return Post(self._client, instance, stage, path, body, headers)

    async def get(self, instance: Instance, path: str, timeout: float) -> tuple[int, bytes]:
        """(status, body) of a small answer. Raises Unreachable, Broken, StageTimeout."""
        async with deadline(timeout, Stage.PROXY, instance):
            try:
                async with self._client.request("GET", instance.url, path, {}) as exchange:
                    return exchange.status, await exchange.read(_ERROR_LIMIT)
            except (ConnectFailed, Cut) as error:
                raise _named(error, Stage.PROXY, instance) from None


class Post:
    """See Upstream.post."""

    __slots__ = ("_instance", "_sending", "_stage")

    def __init__(
        self,
        client: Client,
        instance: Instance,
        stage: Stage,
        path: str,
        body: Buffer | list[Buffer],
        headers: Mapping[str, str],
    ) -> None:
        self._instance = instance
        self._stage = stage
        self._sending = client.request("POST", instance.url, path, {**headers, "content-type": JSON}, body)

    async def __aenter__(self) -> Answer:
        try:
            exchange = await self._sending.__aenter__()
        except (ConnectFailed, Cut) as error:
            raise _named(error, self._stage, self._instance) from None
        if exchange.status == 200:
            return Answer(exchange, self._stage, self._instance)
        try:
            said = await _some(exchange)
        finally:
            await self._sending.__aexit__(None, None, None)
        raise Refused(exchange.status, said, stage=self._stage, retry_after=exchange.headers.get("retry-after"))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sending.__aexit__(kind, error, trace)


class deadline:
    """The end of a stage's patience, which the caller may reschedule. Raises StageTimeout."""

    __slots__ = ("_instance", "_stage", "_timer")

    def __init__(self, seconds: float | None, stage: Stage, instance: Instance) -> None:
        self._timer = asyncio.timeout(seconds)
        self._stage = stage
        self._instance = instance

    async def __aenter__(self) -> asyncio.Timeout:
        return await self._timer.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timer.__aexit__(kind, error, trace)
        except TimeoutError:
            raise StageTimeout(
                f"{_who(self._stage, self._instance)} did not answer in time", stage=self._stage
            ) from None


async def _some(exchange: Exchange) -> bytes:
    """An error answer's body, up to a limit; a body that breaks off still leaves the status to tell."""
    try:
        return (await exchange.read(_ERROR_LIMIT))[:_ERROR_LIMIT]
    except Cut:
        return b""


def _named(error: ConnectFailed | Cut, stage: Stage, instance: Instance) -> EngineFailed:
    who = _who(stage, instance)
    if isinstance(error, ConnectFailed):
        return Unreachable(f"{who} {error}", stage=stage)
    if str(error).startswith("not HTTP"):
        return Broken(f"{who} failed: {error}", stage=stage)
    if error.begun:
        return Broken(f"{who} broke off in the middle of its answer", stage=stage)
    return Broken(f"{who} closed the connection without an answer", stage=stage)


def _who(stage: Stage, instance: Instance) -> str:
    return f"the {instance.role.label if stage is Stage.PROXY else stage} engine {instance.netloc}"
