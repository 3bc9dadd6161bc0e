"""Media behind URLs, measured over real sockets; and that nothing which their hosts do is more than a size unknown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web

from proxy import openai
from proxy.core import Api, Handle, Job
from proxy.media.addresses import Rules
from proxy.media.costs import Costs
from proxy.media.formats import Shape
from proxy.media.measuring import Measuring
from proxy.media.resolving import Resolver
from proxy.media.vision import DEFAULT
from proxy.openai import Identity
from tests.fakes.media import chat, image, part
from tests.support import containers

PICTURE = image(1280, 720, "BMP")


class Host:
    """Serves PICTURE under any path, as the path says."""

    def __init__(self) -> None:
        self.asked: list[web.BaseRequest] = []
        self.sent = 0
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)
        match request.path:
            case "/whole":
                return web.Response(body=PICTURE)
            case "/typed":
                return web.Response(body=PICTURE, headers={"content-type": "image/bmp"})
            case "/gone":
                return web.Response(status=404, body=PICTURE)
            case "/moved":
                raise web.HTTPFound("/picture")
            case "/silent":
                await asyncio.Event().wait()
            case "/endless":
                return await self._endless(request)
            case "/film":
                film = containers.mp4((640, 360), 10, 250)
                headers = {"content-range": f"bytes 0-{len(film) - 1}/123456789"}
                return web.Response(status=206, body=film, headers=headers)
            case "/odd":
                return web.Response(status=206, body=PICTURE[:99], headers={"content-range": "bytes x"})
            case "/broken" if request.transport is not None:
                request.transport.abort()
        headers = {"content-range": f"bytes 0-65535/{len(PICTURE)}"}
        return web.Response(status=206, body=PICTURE[: 64 << 10], headers=headers)

    async def _endless(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(PICTURE[:1000])
        while True:
            await response.write(bytes(64 << 10))
            self.sent += 64 << 10


@asynccontextmanager
async def hosted() -> AsyncIterator[Host]:
    host = Host()
    runner = web.ServerRunner(web.Server(host.answer), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield host
    finally:
        await runner.cleanup()


def parts(*urls: str, kind: str = "image_url") -> list[dict[str, Any]]:
    return [{"type": kind, kind: {"url": url}} for url in urls]


def parsed(costs: Costs, *given: dict[str, Any], **fields: Any) -> Job:
    return openai.parse(orjson.dumps(chat(*given, **fields)), Api.CHAT, "id", Identity(), costs=costs)


async def measured(
    *given: dict[str, Any], costs: Costs | None = None, seconds: float = 10.0, private: bool = True, **fields: Any
) -> Job:
    costs = costs or Costs()
    measuring = Measuring(costs, seconds, None if private else Resolver(Rules()))
    async with measuring.running():
        return await measuring.measured(parsed(costs, *given, **fields))


REAL = DEFAULT.price(Shape("image", 1, 1280, 720))


@pytest.mark.parametrize("path", ["/a/picture.bmp?x=1&y=%20#z", "/whole", "/endless", "/odd"])
async def test_an_image_behind_a_url_is_priced_by_its_pixels(path: str) -> None:
    async with hosted() as host:
        (item,) = (await measured(*parts(host.url + path))).items
    assert (item.tokens, item.work, item.nbytes) == (*REAL, REAL[0] * DEFAULT.embedding_bytes)
    (request,) = host.asked
    assert (request.method, request.path_qs) == ("GET", path.partition("#")[0])
    assert request.headers["range"] == "bytes=0-65535" and request.headers["host"] in host.url
    assert host.sent < 16 << 20, "it is hung up on, and what was on its way is the system's"


async def test_a_film_is_priced_by_its_length() -> None:
    async with hosted() as host:
        (item,) = (await measured(*parts(f"{host.url}/film", kind="video_url"))).items
    assert item.tokens == DEFAULT.tokens(Shape("video", 1, 640, 360, 250, 10.0))


@pytest.mark.parametrize("path", ["/gone", "/moved", "/broken", "/silent"])
async def test_what_cannot_be_measured_costs_what_it_did_and_nobody_is_asked_twice(path: str) -> None:
    costs = Costs()
    async with hosted() as host:
        for _ in range(2):
            job = await measured(*parts(host.url + path), costs=costs, seconds=0.3)
            assert job.items == parsed(Costs(), *parts(host.url + path)).items
    assert len(host.asked) == 1


async def test_one_silent_host_keeps_no_other_from_being_measured() -> None:
    async with hosted() as host:
        job = await measured(*parts(f"{host.url}/silent", f"{host.url}/x", f"{host.url}/x"), seconds=1.0)
    assert [item.tokens for item in job.items] == [1024, REAL[0], REAL[0]]
    assert sorted(request.path for request in host.asked) == ["/silent", "/x"]


async def test_what_is_known_is_not_asked_for() -> None:
    costs = Costs()
    async with hosted() as host:
        url = f"{host.url}/known"
        costs.sizes.learn(parsed(costs, *parts(url)).items[0], Handle("h", "image", {"image_grid_thw": [1, 4, 4]}, {}))
        job = await measured(part(image()), *parts(url), costs=costs)
    assert job.items[1].tokens == 4 and host.asked == []


async def test_a_requests_own_bounds_hold_for_what_was_measured() -> None:
    async with hosted() as host:
        job = await measured(*parts(f"{host.url}/x"), mm_processor_kwargs={"max_pixels": 78400})
    assert job.items[0].tokens <= 100


async def test_not_more_than_some_of_a_requests_urls_are_measured() -> None:
    async with hosted() as host:
        await measured(*parts(*(f"{host.url}/{n}" for n in range(40))))
    assert len(host.asked) == 16


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_nobody_is_led_to_a_private_address(name: str) -> None:
    async with hosted() as host:
        job = await measured(*parts(host.url.replace("127.0.0.1", name)), private=False)
    assert job.items[0].tokens == 1024 and host.asked == []


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "http://h/a b", "http://h/\r\nx: y", "http://h:0x/", "http://[/", "http://"]
)
async def test_what_is_no_url_is_left(url: str) -> None:
    assert (await measured(*parts(url))).items[0].tokens == 1024
