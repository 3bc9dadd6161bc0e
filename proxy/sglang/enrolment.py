"""Keeps the virtual encoder on the lists of SGLang's language servers (0.5.13 and later), which forget it when they
start again. A list that cannot be reached is tried again for ever; nothing here fails a request.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import orjson

from proxy.callbacks import local_address
from proxy.http.client import Client, ConnectFailed, Cut, system_trust
from proxy.http.message import JSON
from proxy.tasks import together

log = logging.getLogger(__name__)

_EVERY_S = 5.0
_ANSWER_S = 5.0
_GOODBYE_S = 1.0
_WILDCARDS = ("", "0.0.0.0", "::")


class Unlisted(Exception):
    """A list did not take what it was told."""


class Enrolment:
    """`lists`: URLs of encoder bootstrap servers. `url`: what they are told; None: this machine's address to each.
    `tls`: as Client has it."""

    def __init__(self, lists: Sequence[str], url: str | None, tls: Callable[[], ssl.SSLContext] = system_trust) -> None:
        self._client = Client(_ANSWER_S, tls=tls)
        self._lists = lists
        self._url = url
        self._enrolled: dict[str, str] = {}  # by list: the URL that it has

    def __repr__(self) -> str:
        return f"<Enrolment on {len(self._enrolled)} of {len(self._lists)} lists>"

    @asynccontextmanager
    async def kept(self, host: str, port: int) -> AsyncIterator[None]:
        """Within, `host`:`port` is on every list that is up; afterwards on none."""
        self._client.open()
        try:
            async with together() as group:
                tasks = [group.create_task(self._keep(one, host, port)) for one in self._lists]
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()
                    await self._leave()
        finally:
            await self._client.close()

    async def _keep(self, one: str, host: str, port: int) -> None:
        said = ""
        while True:
            try:
                await self._enrol(one, await self._own(one, host, port))
                said = ""
            except (Unlisted, OSError) as error:
                self._enrolled.pop(one, None)
                if str(error) != said:
                    said = str(error)
                    log.warning("%s does not list this encoder: %s", one, said)
            await asyncio.sleep(_EVERY_S)

    async def _enrol(self, one: str, url: str) -> None:
        await self._say("POST", one, "/register_encoder_url", url, _ANSWER_S)
        if self._enrolled.get(one) != url:
            self._enrolled[one] = url
            log.info("%s lists the encoder %s", one, url)

    async def _own(self, one: str, host: str, port: int) -> str:
        if self._url is not None:
            return self._url
        if host in _WILDCARDS:
            host = await local_address(one)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def _leave(self) -> None:
        for one, url in list(self._enrolled.items()):
            try:
                await self._say("DELETE", one, "/unregister_encoder_url", url, _GOODBYE_S)
            except Unlisted as error:
                log.info("%s still lists the encoder %s: %s", one, url, error)
        self._enrolled.clear()

    async def _say(self, method: str, one: str, path: str, url: str, seconds: float) -> None:
        body = orjson.dumps({"url": url})
        try:
            async with asyncio.timeout(seconds):
                async with self._client.request(method, one, path, f"content-type: {JSON}\r\n", body) as exchange:
                    if exchange.status != 200:
                        raise Unlisted(f"{method} {path} answers {exchange.status}")
                    await exchange.read()
        except (ConnectFailed, Cut, TimeoutError) as error:
            raise Unlisted(f"{method} {path}: {error or 'no answer in time'}") from None
