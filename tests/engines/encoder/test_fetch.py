"""Fetching over real sockets and files: every limit, and every way around it that clients try."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from engines.encoder.fetch import INLINE_CHARACTERS, Fetcher, ForbiddenHost, PublicResolver
from engines.errors import BadRequest, EngineError
from engines.settings import EncoderSettings


async def here(function: Callable[[], bytes]) -> bytes:
    return function()


@asynccontextmanager
async def fetcher(**changes: Any) -> AsyncIterator[Fetcher]:
    it = Fetcher(EncoderSettings(model=Path("m"), **changes), here)
    try:
        yield it
    finally:
        await it.close()


async def refused(url: str, **changes: Any) -> EngineError:
    async with fetcher(**changes) as it:
        with pytest.raises(BadRequest) as caught:
            await it.fetch(url)
    return caught.value


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


# ---- data:


@pytest.mark.parametrize("size", [0, 5, INLINE_CHARACTERS])
async def test_data_urls(size: int) -> None:
    data = os.urandom(size)
    async with fetcher() as it:
        assert await it.fetch(data_url(data)) == data
        assert await it.fetch("data:;base64," + quote(base64.b64encode(data))) == data
        assert await it.fetch("data:image/png," + quote(data)) == data


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64,abc", "invalid_image_url"),
        ("data:image/png;base64,é", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        ("image.png", "invalid_image_url"),
        ("", "invalid_image_url"),
        (data_url(bytes(2000)), "image_too_large"),
        ("data:," + "a" * 2000, "image_too_large"),
    ],
)
async def test_what_is_no_media_url_or_too_large(url: str, code: str) -> None:
    assert (await refused(url, max_media_bytes=1000)).code == code


# ---- file:


async def test_files_are_off_by_default() -> None:
    error = await refused("file:///etc/passwd")
    assert (error.status, error.code) == (403, "image_forbidden")
    assert "--allowed-media-roots" in error.message


async def test_a_file_under_an_allowed_root(tmp_path: Path) -> None:
    (tmp_path / "a picture.png").write_bytes(b"pixels")
    async with fetcher(allowed_media_roots=(tmp_path,)) as it:
        assert await it.fetch((tmp_path / "a picture.png").as_uri()) == b"pixels"
        assert await it.fetch(f"file://localhost{tmp_path}/a%20picture.png") == b"pixels"


@pytest.mark.parametrize(
    "name", ["../secret", "link", "folder/../../secret", "%2e%2e/secret", "loop", "a%00b", "../nothing"]
)
async def test_no_way_out_of_the_roots(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    error = await refused(f"file://{root}/{name}", allowed_media_roots=(root,))
    if name != "loop":
        assert (error.status, error.code) == (403, "image_forbidden")


async def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"pixels")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    async with fetcher(allowed_media_roots=(tmp_path,)) as it:
        assert await it.fetch(f"file://{tmp_path}/link") == b"pixels"


async def test_files_that_are_not_plain_small_files(tmp_path: Path) -> None:
    roots = {"allowed_media_roots": (tmp_path,), "max_media_bytes": 10}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    assert (await refused(f"file://{tmp_path}/pipe", **roots)).code == "image_forbidden"
    assert (await refused(f"file://{tmp_path}/large", **roots)).code == "image_too_large"
    assert (await refused(f"file://{tmp_path}/none", **roots)).code == "image_unreachable"
    assert (await refused(f"file://{tmp_path}", **roots)).code == "image_forbidden"
    assert (await refused(f"file://elsewhere{tmp_path}/large", **roots)).code == "image_forbidden"


# ---- http:


@asynccontextmanager
async def host(**routes: Callable[[web.Request], Any]) -> AsyncIterator[str]:
    app = web.Application()
    for name, handler in routes.items():
        app.router.add_get(f"/{name}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def pixels(_request: web.Request) -> web.Response:
    return web.Response(body=b"pixels")


async def hang(_request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(1000))


def to(location: str) -> Callable[[web.Request], Any]:
    async def redirect(_request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"location": location})

    return redirect


async def test_an_image_over_http_with_redirects() -> None:
    async with host(a=to("/b"), b=to("c"), c=pixels) as url, fetcher(allow_private_hosts=True) as it:
        assert await it.fetch(f"{url}/a") == b"pixels"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("hang", "image_timeout"),
        ("endless", "image_too_large"),
        ("nothing", "image_unreachable"),
        ("loop", "image_unreachable"),
        ("away", "invalid_image_url"),
        ("file", "invalid_image_url"),
    ],
)
async def test_hosts_that_do_not_deliver(path: str, code: str) -> None:
    routes = {
        "hang": hang,
        "endless": endless,
        "loop": to("/loop"),
        "away": to("ftp://x/"),
        "file": to("file:///etc/passwd"),
    }
    async with host(**routes) as url:
        error = await refused(f"{url}/{path}", allow_private_hosts=True, fetch_timeout=1.0, max_media_bytes=5000)
    assert error.code == code


async def test_an_error_names_what_it_is_about() -> None:
    async with host(hang=hang) as url, fetcher(allow_private_hosts=True, fetch_timeout=0.1) as it:
        with pytest.raises(BadRequest, match="the video did not arrive") as raised:
            await it.fetch(f"{url}/hang", "video")
    assert raised.value.code == "video_timeout"


async def test_a_closed_port_is_unreachable() -> None:
    async with host() as url:
        pass
    assert (await refused(url, allow_private_hosts=True)).code == "image_unreachable"


@pytest.mark.parametrize(
    "url", ["http://", "http://exa mple/", "http://[::1/", "http:///x", "http://127.1/", "http://2130706433/"]
)
async def test_malformed_urls(url: str) -> None:
    assert (await refused(url, allow_private_hosts=True)).status == 400


async def test_remote_media_can_be_off() -> None:
    assert (await refused("http://example.com/a.png", allow_remote_media=False)).code == "image_forbidden"


@pytest.mark.parametrize(
    "name",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "0x7f.1",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "168.63.129.16",
    ],
)
async def test_private_hosts_are_not_contacted(name: str) -> None:
    error = await refused(f"http://{name}:1/latest/meta-data")
    assert (error.status, error.code) == (403, "image_forbidden")
    assert "--allow-private-hosts" in error.message


class Names(AbstractResolver):
    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        addresses = {"open.test": ["93.184.216.34"], "mixed.test": ["93.184.216.34", "10.0.0.1"]}[host]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        pass


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    resolver = PublicResolver(Names())
    assert len(await resolver.resolve("open.test")) == 1
    with pytest.raises(ForbiddenHost):
        await resolver.resolve("mixed.test")
    await resolver.close()


async def test_fetches_at_once_are_bounded() -> None:
    running = most = 0

    async def slow(_request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return web.Response(body=b"pixels")

    async with host(slow=slow) as url, fetcher(allow_private_hosts=True, max_fetches=2) as it:
        await asyncio.gather(*(it.fetch(f"{url}/slow") for _ in range(8)))
    assert most == 2
