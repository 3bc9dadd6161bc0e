"""Decode's call for prefill: posts a descriptor to the metaserver, usually the proxy, and reads its verdict. No KV
passes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from engines.errors import DeadlineExceeded, PeerFailed
from engines.language.failures import refused_prefill
from engines.tls import Files


class Metaserver:
    """Whoever finds a prefill engine for us. `timeout` is --metaserver-timeout, and covers the prefill itself; `tls` is
    for https URLs; None: the system is trusted."""

    def __init__(self, session: aiohttp.ClientSession, timeout: float, tls: Files | None = None) -> None:
        self._session = session
        self._tls = tls
        self._timeout = timeout

    async def call(self, url: str, descriptor: Mapping[str, Any]) -> None:
        """Returns when prefill is done. Raises EngineError: what the metaserver says, or that it says nothing."""
        try:
            async with self._session.post(
                url,
                data=orjson.dumps(descriptor),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                ssl=True if self._tls is None else self._tls.context(),
            ) as response:
                answer = await response.read()
                if response.status != 200:
                    raise refused_prefill(response.status, _json(answer))
        except TimeoutError:
            message = f"no answer from the metaserver at {url} within --metaserver-timeout {self._timeout:g} s"
            raise DeadlineExceeded(message, stage="prefill", code="metaserver_timeout") from None
        except aiohttp.ClientError as error:
            message = f"the metaserver at {url} failed: {error!r}"
            raise PeerFailed(message, stage="prefill", code="metaserver_unreachable") from error


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
