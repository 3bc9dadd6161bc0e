"""HTTP to engines: one client, one edge where its errors become ours. Decides nothing and retries nothing."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from proxy.core import Instance, Stage
from proxy.errors import Broken, EngineFailed, Refused, StageTimeout, Unreachable
from proxy.http.client import Client, ConnectFailed, Cut, Exchange, Late, system_trust
from proxy.http.message import JSON, Buffer

_ERROR_LIMIT = 1 << 20
_CONTENT = f"content-type: {JSON}\r\n"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The patience of each stage, in seconds."""

    connect: float
    encode: float
    prefill: float
    first_token: float
    stream_idle: float
    answer: float


class Answer(Exchange):
    """A call of an engine and its answer, whose failures are told in our words: Unreachable, Broken, StageTimeout."""

    __slots__ = ("_instance", "_stage")

    def __init__(
        self,
        client: Client,
        method: str,
        path: str,
        fields: str,
        body: Buffer | list[Buffer],
        stage: Stage,
        instance: Instance,
    ) -> None:
        super().__init__(client, method, instance.url, path, fields, body)
        self._stage = stage
        self._instance = instance

    def named(self, error: ConnectFailed | Cut | Late) -> EngineFailed:
        stage = self._stage
        who = f"the {self._instance.role.label if stage is Stage.PROXY else stage} engine {self._instance.netloc}"
        if isinstance(error, Late):
            return StageTimeout(f"{who} did not answer in time", stage=stage)
        if isinstance(error, ConnectFailed):
            return Unreachable(f"{who} {error}", stage=stage)
        if str(error).startswith(("not HTTP", "TLS")):
            return Broken(f"{who} failed: {error}", stage=stage)
        if error.begun:
            return Broken(f"{who} broke off in the middle of its answer", stage=stage)
        return Broken(f"{who} closed the connection without an answer", stage=stage)


class Post(Answer):
    """See Upstream.post."""

    __slots__ = ()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if self.status != 200:
            await self._refused()
        return self

    async def _refused(self) -> None:
        """Raises Refused."""
        said = b""
        try:
            with suppress(Broken):  # a body that breaks off still leaves the status to tell
                said = (await self.read(_ERROR_LIMIT))[:_ERROR_LIMIT]
        finally:
            await self.__aexit__(None, None, None)
        raise Refused(self.status, said, stage=self._stage, retry_after=self.header("retry-after"))


class Upstream:
    """All connections to engines. `async with` opens and closes them."""

    def __init__(
        self,
        timeouts: Timeouts,
        key: str | None = None,
        tls: Callable[[], ssl.SSLContext] = system_trust,
    ) -> None:
        """`key`: the bearer token for engines without a secret of their own. `tls`: as Client has it."""
        self.timeouts = timeouts
        self._key = key
        self._client = Client(timeouts.connect, tls=tls)

    def __repr__(self) -> str:
        return f"<Upstream {self._client!r}>"

    def go_by(self, timeouts: Timeouts, key: str | None) -> None:
        """Other patience and another key, for calls that begin from now on."""
        self.timeouts = timeouts
        self._key = key
        self._client.connect_timeout = timeouts.connect

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
        fields: str,
        seconds: float | None,
    ) -> Post:
        """A call with `body`, whole or in pieces, that may take `seconds`; `fields` are whole lines of its head.

        `async with` sends it and begins once the engine has answered with status 200; leaving before the answer's end
        closes the connection. Raises Unreachable, Broken, StageTimeout, Refused.
        """
        secret = instance.secret or self._key
        if secret is not None:
            fields = _with_secret(fields, secret)
        answer = Post(self._client, "POST", path, _CONTENT + fields, body, stage, instance)
        answer.patience(seconds)
        return answer

    async def get(self, instance: Instance, path: str, seconds: float) -> tuple[int, bytes]:
        """(status, body) of a small answer. Raises Unreachable, Broken, StageTimeout."""
        secret = instance.secret or self._key
        fields = "" if secret is None else _with_secret("", secret)
        answer = Answer(self._client, "GET", path, fields, b"", Stage.PROXY, instance)
        answer.patience(seconds)
        async with answer:
            return answer.status, await answer.read(_ERROR_LIMIT)


def _with_secret(fields: str, secret: str) -> str:
    """The head's lines with `secret` as their only credential."""
    others = "".join(line for line in fields.splitlines(keepends=True) if not line.startswith("authorization:"))
    return f"authorization: Bearer {secret}\r\n{others}"
