"""Gets the bytes of a media URL: `data:`, `http(s)://` and `file://`. It decodes no media and keeps nothing.

URLs come from clients, so every way to spend this machine's memory, time or trust has a limit:

- bytes: counted while they arrive, whatever the headers promise (--max-media-bytes);
- time: one deadline over all redirects (--fetch-timeout), and a bound on fetches at once (--max-fetches);
- reach: hosts that resolve to addresses outside the open Internet are refused, at every redirect, by the resolver that
  the connection itself uses, so that a name cannot change its mind after the check (--allow-private-hosts);
- files: only regular files under --allowed-media-roots, after links are resolved, and following none put there since.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from pathlib import Path
from socket import AF_INET, AddressFamily
from typing import Protocol
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engines.encoder import files
from engines.encoder.addresses import is_public
from engines.errors import BadRequest, Forbidden, TooLarge
from engines.settings import EncoderSettings

REDIRECTS = frozenset({301, 302, 303, 307, 308})
CHUNK = 1 << 16
INLINE_CHARACTERS = 1 << 16
"""A shorter data URL is decoded on the loop: the hop to a thread costs more than 64 KiB of base64 (~40 µs)."""


class Run(Protocol):
    """Runs a blocking function elsewhere than on the event loop."""

    def __call__(self, function: Callable[[], bytes], /) -> Awaitable[bytes]: ...


class ForbiddenHost(OSError):
    """A host that clients may not make this machine contact. An OSError, because that is what resolvers raise."""


class PublicResolver(AbstractResolver):
    """Resolves names, and refuses those that lead into this machine's own network."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(self, host: str, port: int = 0, family: AddressFamily = AF_INET) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise ForbiddenHost(f"{host} is a private address")
        return found

    async def close(self) -> None:
        await self._inner.close()


class Fetcher:
    """One client session with the limits of the settings. `run`: where blocking work goes.

    Every method raises BadRequest or a subclass, with a code that names the media: `image_…` or `invalid_image_url`,
    where `what` is an image.
    """

    def __init__(self, settings: EncoderSettings, run: Run) -> None:
        self._settings = settings
        self._run = run
        self._limit = int(settings.max_media_bytes)
        self._roots = settings.allowed_media_roots
        self._slots = asyncio.Semaphore(settings.max_fetches)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, url: str, what: str = "image") -> bytes:
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            if len(url) <= INLINE_CHARACTERS:
                return self._from_data(url, what)
            return await self._run(lambda: self._from_data(url, what))
        if scheme == "file":
            return await self._run(lambda: self._from_file(url, what))
        if scheme in ("http", "https"):
            return await self._from_http(url, what)
        raise BadRequest("a media URL starts with data:, https://, http:// or file://", code=f"invalid_{what}_url")

    # ---- data:

    def _from_data(self, url: str, what: str) -> bytes:
        header, comma, payload = url[5:].partition(",")
        if not comma:
            raise BadRequest("the data URL has no comma before its content", code=f"invalid_{what}_url")
        encoded = header.endswith(";base64")
        size = len(payload) * 3 // 4 - 2 if encoded else len(payload) // 3
        if size > self._limit:
            raise self._too_large(what)
        try:
            data = (
                base64.b64decode(unquote(payload) if "%" in payload else payload)
                if encoded
                else unquote_to_bytes(payload)
            )
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"the data URL is not valid base64: {error}", code=f"invalid_{what}_url") from None
        if len(data) > self._limit:
            raise self._too_large(what)
        return data

    # ---- file:

    def _from_file(self, url: str, what: str) -> bytes:
        if not self._roots:
            raise Forbidden(
                "file:// URLs are off: start the encoder with --allowed-media-roots", code=f"{what}_forbidden"
            )
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise Forbidden("a file:// URL names no host", code=f"{what}_forbidden")
        try:
            data = files.read(Path(unquote(parts.path)), self._roots, self._limit + 1)
        except (files.Outside, ValueError):  # a null byte
            # The same answer whether the file exists or not: what lies outside the roots is nobody's business.
            told = "the file is outside --allowed-media-roots, or no regular file"
            raise Forbidden(told, code=f"{what}_forbidden") from None
        except OSError as error:
            raise BadRequest(f"cannot read the file: {error.strerror}", code=f"{what}_unreachable") from None
        if len(data) > self._limit:
            raise self._too_large(what)
        return data

    # ---- http:

    async def _from_http(self, url: str, what: str) -> bytes:
        if not self._settings.allow_remote_media:
            raise Forbidden("this encoder fetches no remote media (--no-allow-remote-media)", code=f"{what}_forbidden")
        try:
            async with self._slots, asyncio.timeout(self._settings.fetch_timeout):
                return await self._follow(url, what)
        except TimeoutError:
            seconds = f"{self._settings.fetch_timeout:g} s (--fetch-timeout)"
            raise BadRequest(f"the {what} did not arrive within {seconds}", code=f"{what}_timeout") from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise BadRequest(f"the URL is malformed: {error}", code=f"invalid_{what}_url") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._network_error(error, what) from None

    async def _follow(self, url: str, what: str) -> bytes:
        target = URL(url)
        for _ in range(self._settings.max_redirects + 1):
            self._check_host(target, what)
            async with self._client().get(target, allow_redirects=False) as response:
                if response.status in REDIRECTS and "location" in response.headers:
                    target = target.join(URL(response.headers["location"]))
                    continue
                if response.status != 200:
                    raise BadRequest(f"the {what}'s host answered {response.status}", code=f"{what}_unreachable")
                return await self._body(response, what)
        limit = self._settings.max_redirects
        raise BadRequest(f"more than {limit} redirects (--max-redirects)", code=f"{what}_unreachable")

    async def _body(self, response: aiohttp.ClientResponse, what: str) -> bytes:
        if (response.content_length or 0) > self._limit:
            raise self._too_large(what)
        data = bytearray()
        async for chunk in response.content.iter_chunked(CHUNK):
            data += chunk
            if len(data) > self._limit:
                raise self._too_large(what)
        return bytes(data)

    def _check_host(self, url: URL, what: str) -> None:
        """Addresses written as numbers never reach the resolver: they are checked here."""
        if url.scheme not in ("http", "https") or not url.host:
            raise BadRequest(f"cannot fetch from {url.scheme or 'a URL without scheme'}", code=f"invalid_{what}_url")
        try:
            public = is_public(url.host)
        except ValueError:
            return  # a name: PublicResolver has the say
        if not public and not self._settings.allow_private_hosts:
            raise ForbiddenHost(f"{url.host} is a private address")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver: AbstractResolver = aiohttp.ThreadedResolver()
            if not self._settings.allow_private_hosts:
                resolver = PublicResolver(resolver)
            # auto_decompress off: a small compressed answer could unpack to any size; media are compressed already.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, limit=self._settings.max_fetches),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "triptych", "Accept": "image/*, video/*", "Accept-Encoding": "identity"},
            )
        return self._session

    def _network_error(self, error: Exception, what: str) -> BadRequest:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ForbiddenHost):
                return Forbidden(f"{cause}: not fetched (--allow-private-hosts)", code=f"{what}_forbidden")
            cause = cause.__cause__
        return BadRequest(f"cannot fetch the {what}: {error or type(error).__name__}", code=f"{what}_unreachable")

    def _too_large(self, what: str) -> TooLarge:
        return TooLarge(f"the {what} is larger than {self._limit} bytes (--max-media-bytes)", code=f"{what}_too_large")
