"""Makes this engine known to proxies while it serves. It serves nothing itself, and no request waits for it.

Each proxy of --register is told three times within --register-ttl that the engine is alive: the first time makes it a
member, and a proxy that has started again knows it with the next. A proxy that cannot be reached is tried for ever.

On leaving they are asked to drain the engine. They give it nothing new from then on, and forget it when all that it had
to do for them has ended: for that `registered` waits, up to --grace seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from engines import tls
from engines.settings import WILDCARDS, EngineSettings

log = logging.getLogger(__name__)

_ANSWER_S = 5.0
_LOOK_S = 0.1  # how often a proxy is asked whether it has forgotten, and the engine which role it has
_BEATS = 3  # within the time to live
_NOT_FOUND = 404


class Unheard(Exception):
    """A proxy did not take what it was told."""


@asynccontextmanager
async def registered(settings: EngineSettings, role: Callable[[], str], url: str) -> AsyncIterator[None]:
    """Within, proxies know the engine that serves at `url`, with the role that it has now, if there are any to be told.
    Raises SetupError."""
    if not settings.proxies:
        yield
        return
    trust = tls.calls(settings)
    said = {"key": settings.key, "ttl": settings.register_ttl, "life": uuid.uuid4().hex}
    timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout) as http, asyncio.TaskGroup() as group:
        calls = Calls(http, settings.register_key, trust)
        proxies = [Proxy(calls, one.rstrip("/"), settings, url, role, said) for one in settings.proxies]
        beats = [group.create_task(proxy.beat()) for proxy in proxies]
        try:
            yield
        finally:
            for beat in beats:
                beat.cancel()
        try:
            async with asyncio.timeout(settings.grace):
                await asyncio.gather(*(proxy.leave() for proxy in proxies))
        except TimeoutError:
            log.warning("not every proxy has forgotten this engine within --grace %g s", settings.grace)


@dataclass(frozen=True, slots=True)
class Calls:
    """How proxies are called."""

    http: aiohttp.ClientSession
    key: str | None
    trust: tls.Files | None

    async def post(self, url: str, body: Mapping[str, Any], *also: int) -> Mapping[str, Any]:
        """Raises Unheard where the answer is neither 200 nor one of `also`."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        context = True if self.trust is None else self.trust.context()
        try:
            async with self.http.post(url, json=body, headers=headers, ssl=context) as response:
                answer: Any = await response.json(content_type=None)
                if response.status not in (200, *also):
                    raise Unheard(f"it answers {response.status}: {_message(answer)}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unheard(str(error) or "it did not answer in time") from None
        return answer if isinstance(answer, dict) else {}


class Proxy:
    """One that is told."""

    def __init__(
        self,
        calls: Calls,
        proxy: str,
        settings: EngineSettings,
        url: str,
        role: Callable[[], str],
        said: Mapping[str, Any],
    ) -> None:
        """`said`: what it is told beside where the engine is, and its role."""
        self._calls = calls
        self._proxy = proxy
        self._settings = settings
        self._url = url
        self._role = role
        self._said = said

    async def beat(self) -> None:
        """For ever."""
        known, trouble = False, ""
        while True:
            role = self._role()
            try:
                taken = (await self._register()).get("registered") is True
                if taken is not known or trouble:
                    log.info("%s %s this engine", self._proxy, "knows" if taken else "was told to do without")
                known, trouble = taken, ""
            except (Unheard, OSError) as error:
                if str(error) != trouble:
                    log.warning("%s does not know this engine: %s", self._proxy, error)
                known, trouble = False, str(error)
            await self._pause(self._settings.register_ttl / _BEATS, role)

    async def _pause(self, seconds: float, role: str) -> None:
        """Until the next word is due: at once where the role is not `role` any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._role() == role:  # noqa: ASYNC110 - roles change once in hours: a look costs less than an event
                    await asyncio.sleep(_LOOK_S)

    async def leave(self) -> None:
        """Until it has nothing left here. One that cannot be reached will find out by itself."""
        try:
            where = {"url": await self._advertised()}
            while (await self._calls.post(f"{self._proxy}/instances/drain", where, _NOT_FOUND)).get("draining"):
                await self._register()  # what it drains is still alive, and may be asked about
                await asyncio.sleep(_LOOK_S)
        except (Unheard, OSError) as error:
            log.warning("%s was not told that this engine leaves: %s", self._proxy, error)

    async def _register(self) -> Mapping[str, Any]:
        """Raises Unheard, OSError."""
        where = {"role": self._role(), "url": await self._advertised()}
        return await self._calls.post(f"{self._proxy}/instances", {**self._said, **where})

    async def _advertised(self) -> str:
        """Where this proxy reaches the engine."""
        if self._settings.advertise is not None:
            return self._settings.advertise.rstrip("/")
        if self._settings.host not in WILDCARDS:
            return self._url
        parts = urlsplit(self._url)
        host = await _local_address(self._proxy)
        return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}"


def _message(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message") if isinstance(error, dict) else answer)


async def _local_address(url: str) -> str:
    """The address of this machine that packets to `url` leave from."""
    parts = urlsplit(url)
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
