"""Gets media that clients name by URL: over HTTP from hosts that the rules allow, or from files. It keeps nothing.

Clients choose what is called, so every way to spend this process's memory, time or trust has a limit: bytes counted as
they arrive, one deadline over all redirects, a number of fetches at once, and each URL on the way judged like the
first. Nothing of the client's own request goes there, and nothing compressed is taken.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin

from proxy.errors import BadRequest, ForbiddenMedia, TooLarge
from proxy.http.client import Client, ConnectFailed, Cut, Exchange, Late
from proxy.media import files
from proxy.media.addresses import Local, Remote, Rules
from proxy.media.resolving import Lookup, Resolver

_REDIRECTS = 3
_MOVED = frozenset({301, 302, 303, 307, 308})
_FIELDS = "accept: image/*, video/*, audio/*\r\naccept-encoding: identity\r\nuser-agent: triptych\r\n"
_TYPE = re.compile(r"(?:image|video|audio)/[a-z0-9.+-]{1,64}|application/(?:ogg|mp4)")
_ANY_TYPE = frozenset({"", "application/octet-stream", "binary/octet-stream"})
_OCTETS = "application/octet-stream"
_LARGE = 1 << 20  # bytes; less is encoded sooner than a thread is asked


@dataclass(frozen=True, slots=True)
class Fetched:
    """Media in their new place: `prefix` and `text` make a data URL of them."""

    prefix: str  # "data:image/png;base64,"
    text: memoryview = field(repr=False)  # base64; whoever uses it holds this very object
    lasting: bool = True  # the next who names the URL may be given the same


@dataclass(frozen=True, slots=True)
class Bounds:
    nbytes: int = 64 << 20  # of one fetch
    seconds: float = 10.0
    at_once: int = 32


class Fetching:
    """`async with running()` around its use."""

    def __init__(self, rules: Rules, bounds: Bounds, lookup: Lookup | None = None) -> None:
        """`lookup`: how names become addresses; None asks the system."""
        self.rules = rules
        self._bounds = bounds
        self._slots = asyncio.Semaphore(bounds.at_once)
        self._resolver = Resolver(rules, lookup)
        self._client = Client(bounds.seconds, self._resolver, idle=bounds.at_once)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._client.open()
        try:
            yield
        finally:
            await self._client.close()
            self._resolver.close()

    def go_by(self, rules: Rules) -> None:
        """Other rules from now on."""
        self.rules = self._resolver.rules = rules

    async def fetch(self, url: str) -> Fetched:
        """The media behind `url`. Raises BadRequest: forbidden, too large, no media, or not there in time."""
        bounds = self._bounds
        try:
            async with asyncio.timeout(bounds.seconds), self._slots:
                target = self.rules.judge(url)
                if target is None:
                    raise ValueError("a data URL is fetched from nowhere")
                return (
                    await self._from_file(target) if isinstance(target, Local) else await self._from_host(url, target)
                )
        except TimeoutError:
            told = f"the media did not arrive within {bounds.seconds:g} s (--media-timeout)"
            raise BadRequest(told, code="media_timeout", retryable=True) from None
        except ConnectFailed as error:
            raise _unreachable(f"the media's host {error}") from None
        except (Cut, Late):
            raise _unreachable("the media's host broke off its answer") from None

    # ---- files

    async def _from_file(self, target: Local) -> Fetched:
        most = self._bounds.nbytes + 1
        try:
            data = await asyncio.to_thread(files.read, target.path, self.rules.roots, most)
        except files.Outside:
            raise ForbiddenMedia("the file is outside of what may be read (--media-roots)") from None
        except OSError as error:
            raise _unreachable(f"the file cannot be read: {error.strerror}") from None
        if len(data) == most:
            raise self._too_large()
        return await _inline(data, _OCTETS)

    # ---- HTTP

    async def _from_host(self, url: str, target: Remote) -> Fetched:
        for _ in range(1 + _REDIRECTS):
            async with self._client.request("GET", target.origin, target.path, _FIELDS) as answer:
                if answer.status not in _MOVED:
                    return await self._answered(answer)
                url = _moved(url, answer)
            onward = self.rules.judge(url)
            if not isinstance(onward, Remote):
                raise ForbiddenMedia("the media's host leads to what is no http: or https: URL")
            target = onward
        raise _unreachable(f"the media's host redirects more than {_REDIRECTS} times")

    async def _answered(self, answer: Exchange) -> Fetched:
        if answer.status != 200:
            raise _unreachable(f"the media's host answered {answer.status}", retryable=answer.status >= 500)
        named = answer.header("content-type").partition(";")[0].strip().lower()
        if _TYPE.fullmatch(named) is None and named not in _ANY_TYPE:
            raise BadRequest("what is behind the URL is no image, video or sound", code="media_type")
        if answer.header("content-encoding").strip().lower() not in ("", "identity"):
            raise BadRequest("what is behind the URL is compressed, which was not asked for", code="media_type")
        length = answer.header("content-length")
        if length.isdecimal() and int(length[:20]) > self._bounds.nbytes:
            raise self._too_large()
        data = bytearray()
        while piece := await answer.chunk():
            data += piece
            if len(data) > self._bounds.nbytes:
                raise self._too_large()
        lasting = not {"no-store", "no-cache"} & set(re.split(r"[ ,]+", answer.header("cache-control").lower()))
        return await _inline(data, _OCTETS if named in _ANY_TYPE else named, lasting)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the media are larger than {self._bounds.nbytes} bytes (--max-media-bytes)", code="media_too_large"
        )


def _moved(url: str, answer: Exchange) -> str:
    """Where a redirect leads. Raises BadRequest."""
    location = answer.header("location").encode("latin-1")
    if not location:
        raise _unreachable(f"the media's host answered {answer.status} and does not say where to go")
    try:
        return urljoin(url, quote(location, safe="/?#%:@!$&'()*+,;=~-._[]"))
    except ValueError as error:
        raise _unreachable(f"the media's host leads to a malformed URL: {error}") from None


async def _inline(data: bytes | bytearray, kind: str, lasting: bool = True) -> Fetched:
    if len(data) > _LARGE:
        text = await asyncio.to_thread(base64.b64encode, data)
    else:
        text = base64.b64encode(data)
    return Fetched(f"data:{kind};base64,", memoryview(text), lasting)


def _unreachable(told: str, *, retryable: bool = True) -> BadRequest:
    return BadRequest(told, code="media_unreachable", retryable=retryable)
