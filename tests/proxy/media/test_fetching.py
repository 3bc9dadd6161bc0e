"""Fetching over real sockets and files: every limit, and every way around it that clients and hosts try."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from aiohttp import web

from proxy.errors import BadRequest, ForbiddenMedia
from proxy.media.addresses import Rules, networks
from proxy.media.fetching import Bounds, Fetching
from proxy.media.resolving import Lookup
from tests.support.names import named

HERE = networks("127.0.0.0/8")


class Host:
    """Answers by path, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[web.BaseRequest] = []
        self.port = 0
        self.running = self.most = 0
        self.sent = 0
        self.other = ""  # where /away leads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._answer(request)
        finally:
            self.running -= 1

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        png = {"content-type": "image/png"}
        match request.path.split("/")[1:]:
            case ["a.png"]:
                return web.Response(body=b"pixels", headers=png)
            case ["type", *named]:
                return web.Response(body=b"pixels", headers={"content-type": "/".join(named)})
            case ["status", number]:
                return web.Response(status=int(number), body=b"pixels", headers=png)
            case ["fresh"]:
                return web.Response(body=b"pixels", headers=png | {"cache-control": "private, No-Store"})
            case ["gzip"]:
                return web.Response(body=b"pixels", headers=png | {"content-encoding": "gzip"})
            case ["size", size]:
                return web.Response(body=bytes(int(size)), headers=png)
            case ["loop"]:
                raise web.HTTPFound("/loop")
            case ["hops", "0"]:
                raise web.HTTPFound("/a.png")
            case ["hops", left]:
                raise web.HTTPFound(f"{int(left) - 1}")
            case ["away"]:
                return web.Response(status=307, headers={"location": self.other})
            case ["nowhere"]:
                return web.Response(status=302)
            case ["hang"]:
                await asyncio.Event().wait()
            case ["slow"]:
                await asyncio.sleep(0.01)
                return web.Response(body=b"pixels", headers=png)
            case ["endless"]:
                return await self._endless(request, bytes(64 << 10), 0.0)
            case ["trickle"]:
                return await self._endless(request, b"x", 0.05)
            case ["broken"]:
                response = web.StreamResponse(headers=png | {"content-length": "100"})
                await response.prepare(request)
                await response.write(b"pixels")
                assert request.transport is not None
                request.transport.abort()
        raise web.HTTPNotFound

    async def _endless(self, request: web.BaseRequest, piece: bytes, pause: float) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "image/png"})
        await response.prepare(request)
        while True:
            await response.write(piece)
            self.sent += len(piece)
            await asyncio.sleep(pause)


@asynccontextmanager
async def hosted() -> AsyncIterator[Host]:
    host = Host()
    runner = web.ServerRunner(web.Server(host.answer, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host.port = runner.addresses[0][1]
    try:
        yield host
    finally:
        await runner.cleanup()


Fetch = Callable[[str], Awaitable[Any]]


@asynccontextmanager
async def fetching(lookup: Lookup | None = None, **given: Any) -> AsyncIterator[Fetching]:
    bounds = Bounds(**{name: given.pop(name) for name in ("nbytes", "seconds", "at_once") if name in given})
    it = Fetching(Rules(**({"mode": "fetch", "networks": HERE} | given)), bounds, lookup)
    async with it.running():
        yield it


async def refused(url: str, lookup: Lookup | None = None, **given: Any) -> BadRequest:
    async with fetching(lookup, **given) as it:
        with pytest.raises(BadRequest) as caught:
            await it.fetch(url)
    return caught.value


# ---- HTTP


async def test_media_over_http_become_a_data_url() -> None:
    async with hosted() as host, fetching() as it:
        got = await it.fetch(f"{host.url}/a.png?x=1#here")
        assert (got.prefix, base64.b64decode(got.text), got.lasting) == ("data:image/png;base64,", b"pixels", True)
        (asked,) = host.asked
        assert asked.path_qs == "/a.png?x=1"
        assert {name.lower() for name in asked.headers} == {"host", "accept", "accept-encoding", "user-agent"}
        assert not (await it.fetch(f"{host.url}/fresh")).lasting


@pytest.mark.parametrize("kind", ["image/webp", "VIDEO/MP4;x=y", "audio/x-wav", "application/ogg"])
async def test_types_of_media(kind: str) -> None:
    async with hosted() as host, fetching() as it:
        assert (await it.fetch(f"{host.url}/type/{kind}")).prefix == f"data:{kind.partition(';')[0].lower()};base64,"


async def test_an_unknown_type_is_left_to_who_decodes() -> None:
    async with hosted() as host, fetching() as it:
        got = await it.fetch(f"{host.url}/type/application/octet-stream")
        assert got.prefix == "data:application/octet-stream;base64,"


@pytest.mark.parametrize("kind", ["text/html", "application/json", "image/", 'image/"><script>', "multipart/mixed"])
async def test_other_types(kind: str) -> None:
    async with hosted() as host:
        assert (await refused(f"{host.url}/type/{kind}")).code == "media_type"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("size/1001", 413, "media_too_large"),
        ("endless", 413, "media_too_large"),
        ("trickle", 400, "media_timeout"),
        ("hang", 400, "media_timeout"),
        ("broken", 400, "media_unreachable"),
        ("gzip", 400, "media_type"),
        ("nothing", 400, "media_unreachable"),
        ("status/500", 400, "media_unreachable"),
        ("status/206", 400, "media_unreachable"),
        ("loop", 400, "media_unreachable"),
        ("hops/3", 400, "media_unreachable"),
        ("nowhere", 400, "media_unreachable"),
    ],
)
async def test_hosts_that_do_not_deliver(path: str, status: int, code: str) -> None:
    async with hosted() as host:
        error = await refused(f"{host.url}/{path}", nbytes=1000, seconds=0.5)
        assert (error.status, error.code) == (status, code)
        assert host.sent < 16 << 20 and len(host.asked) <= 4


async def test_redirects_up_to_three() -> None:
    async with hosted() as host, fetching() as it:
        assert (await it.fetch(f"{host.url}/hops/2")).text == base64.b64encode(b"pixels")
        assert len(host.asked) == 4


async def test_a_size_at_the_limit() -> None:
    async with hosted() as host, fetching(nbytes=1000) as it:
        assert len(base64.b64decode((await it.fetch(f"{host.url}/size/1000")).text)) == 1000


async def test_a_closed_port() -> None:
    async with hosted() as host:
        url = host.url
    error = await refused(f"{url}/a.png")
    assert (error.code, error.retryable) == ("media_unreachable", True) and "refused" in error.message


async def test_fetches_at_once_are_bounded_and_those_that_wait_spend_their_own_time() -> None:
    async with hosted() as host, fetching(at_once=2) as it:
        await asyncio.gather(*(it.fetch(f"{host.url}/slow?{n}") for n in range(8)))
        assert host.most == 2
    async with hosted() as host, fetching(at_once=1, seconds=0.3) as it:
        found = await asyncio.gather(*(it.fetch(f"{host.url}/hang?{n}") for n in range(3)), return_exceptions=True)
        assert [getattr(error, "code", None) for error in found] == ["media_timeout"] * 3 and host.most == 1


async def test_leaving_hangs_up() -> None:
    async with hosted() as host, fetching() as it:
        task = asyncio.create_task(it.fetch(f"{host.url}/hang"))
        while not host.running:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            while host.running:
                await asyncio.sleep(0.005)


# ---- whose network


async def test_the_own_network_is_not_called() -> None:
    async with hosted() as host:
        for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
            error = await refused(f"http://{name}:{host.port}/a.png", networks=())
            assert (error.status, error.code) == (403, "media_forbidden")
        assert host.asked == []


@pytest.mark.parametrize(
    "location",
    [
        *("http://169.254.169.254/latest/meta-data", "http://0xa9fea9fe/", "http://[::1]/", "//10.0.0.1/", "//127.1/"),
        *("file:///etc/passwd", "gopher://x/", "data:image/png;base64,AAAA", "http://a@b/", "http://h\\@127.0.0.1/"),
        *("http://[::1", "/\x7f", "javascript:alert(1)"),
    ],
)
async def test_redirects_are_judged_like_the_first_url(location: str) -> None:
    async with hosted() as host:
        host.other = location
        error = await refused(f"{host.url}/away", roots=(PurePosixPath("/"),))
        assert error.code in ("media_forbidden", "invalid_media_url", "media_unreachable")
        assert error.code == "media_forbidden" or "169" not in location
        assert all(request.path in ("/away", "/%7F") for request in host.asked)


async def test_a_redirect_to_a_name_is_resolved_and_judged() -> None:
    async with hosted() as host, named(inner_test=lambda _: ["10.0.0.1"], h_test=lambda _: ["127.0.0.1"]) as names:
        host.other = f"http://inner.test:{host.port}/a.png"
        assert isinstance(await refused(f"http://h.test:{host.port}/away", names.lookup), ForbiddenMedia)
        assert names.asked == {"h.test": 1, "inner.test": 1} and len(host.asked) == 1


async def test_a_name_that_changes_its_mind_gains_nothing() -> None:
    """It is public when asked first, and private ever after: whoever asks twice connects to the second."""
    async with hosted() as host, named(rebind_test=lambda n: ["192.0.2.1"] if n == 0 else ["127.0.0.1"]) as names:
        rules = {"networks": networks("192.0.2.0/24"), "seconds": 0.5}
        error = await refused(f"http://rebind.test:{host.port}/a.png", names.lookup, **rules)
        assert error.code in ("media_timeout", "media_unreachable"), "it was the first that was called"
        assert names.asked["rebind.test"] == 1 and host.asked == []
        error = await refused(f"http://rebind.test:{host.port}/a.png", names.lookup, **rules)
        assert error.code == "media_forbidden" and host.asked == []


async def test_a_listed_host_is_no_way_to_others() -> None:
    async with hosted() as host, named(cdn_test=lambda _: ["127.0.0.1"], evil_test=lambda _: ["127.0.0.1"]) as names:
        async with fetching(names.lookup, hosts=("cdn.test",)) as it:
            await it.fetch(f"http://cdn.test:{host.port}/a.png")
        host.other = f"http://evil.test:{host.port}/a.png"
        assert isinstance(
            await refused(f"http://cdn.test:{host.port}/away", names.lookup, hosts=("cdn.test",)), ForbiddenMedia
        )
        assert "evil.test" not in names.asked


# ---- files


async def test_files(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"pixels")
    (tmp_path / "large").write_bytes(bytes(11))
    (tmp_path / "out").symlink_to("/etc/hostname")
    roots = (PurePosixPath(tmp_path),)
    async with fetching(roots=roots) as it:
        assert (await it.fetch(f"file://{tmp_path}/a%20b.png")).text == base64.b64encode(b"pixels")
    for name, code in (("large", "media_too_large"), ("none", "media_unreachable"), ("out", "media_forbidden")):
        assert (await refused(f"file://{tmp_path}/{name}", roots=roots, nbytes=10)).code == code
    assert (await refused(f"file://{tmp_path}/a%20b.png")).code == "media_forbidden"
