"""Media behind URLs become part of a request, over real sockets: once for all who want them, and within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
from aiohttp import web

from proxy import openai
from proxy.core import Api, Job
from proxy.errors import BadRequest, ForbiddenMedia, Overloaded
from proxy.intake.limits import Limits
from proxy.media.addresses import Rules, networks
from proxy.media.costs import Costs
from proxy.media.fetching import Bounds, Fetched, Fetching
from proxy.media.inlining import Inlining, Memory, Shelf
from proxy.media.splice import Cut
from proxy.openai import Identity
from tests.fakes.media import chat, data_url, image, part

PICTURE = image(1280, 720)
RULES = Rules(mode="fetch", networks=networks("127.0.0.0/8"))
PLAIN = Identity()


class Host:
    """Serves PICTURE under any path once `gate` is open, and 404 under /gone."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.headers = {"content-type": "image/png"}
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.path)
        await self.gate.wait()
        return web.Response(status=404 if request.path == "/gone" else 200, body=PICTURE, headers=self.headers)

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(5):
            while len(self.asked) < times:
                await asyncio.sleep(0.001)


class Here:
    """An Inlining with a clock of its own."""

    def __init__(self, host: Host, kept: int = 1 << 20, most: int = 1 << 20, room: int = 1 << 20) -> None:
        self.host = host
        self.now = 0.0
        self.it = Inlining(Fetching(RULES, Bounds(seconds=5.0)), Memory(kept, most, room), lambda: self.now)

    async def __call__(
        self, *parts: dict[str, Any], identity: Identity = PLAIN, limits: Limits | None = None, **fields: Any
    ) -> Job:
        limits = limits or Limits(rules=RULES)
        job = openai.parse(orjson.dumps(chat(*parts, **fields)), Api.CHAT, "id", identity, limits=limits)
        return await self.it.inlined(job, identity, Costs(), limits)

    def url(self, path: str = "/a") -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.host.url + path, "detail": "high"}}


@asynccontextmanager
async def here(**given: Any) -> AsyncIterator[Here]:
    host = Host()
    runner = web.ServerRunner(web.Server(host.answer), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    found = Here(host, **given)
    try:
        async with found.it.running():
            yield found
    finally:
        await runner.cleanup()


def whole(job: Job) -> Any:
    pieces = openai.encoded(job.body, job)
    return orjson.loads(b"".join(pieces) if isinstance(pieces, list) else pieces)


@pytest.mark.parametrize("identity", [PLAIN, Identity(b"tenant")], ids=["plain", "salted"])
async def test_a_job_is_what_it_would_be_had_the_media_come_inline(identity: Identity) -> None:
    async with here() as it:
        sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
        job = await it(it.url(), part(image()), it.url("/b"), sound, identity=identity, seed=1)
        inline = {"type": "image_url", "image_url": {"url": data_url(PICTURE), "detail": "high"}}
        wanted = openai.parse(orjson.dumps(chat(inline, part(image()), inline, sound)), Api.CHAT, "id", identity)
    for item, other in zip(job.items, wanted.items, strict=True):
        assert replace(item, content={}) == replace(other, content={})
    content = whole(job)["messages"][0]["content"]
    named = [{**given, "uuid": item.mm_hash} for given, item in zip([inline] * 2, wanted.items[::2], strict=True)]
    assert [content[1], content[3]] == named and whole(job)["seed"] == 1
    assert isinstance(job.items[0].content["image_url"]["url"], Cut), "no megabytes in the body"
    assert job.nbytes >= 2 * len(data_url(PICTURE)) - 100, "what was fetched counts as the request's own"


async def test_a_bare_url_and_a_trusted_name_stay_what_they_are() -> None:
    async with here() as it:
        bare = {"image_url": it.host.url + "/a", "uuid": "mine"}
        job = await it(bare, identity=Identity(trust_client=True))
    (item,) = job.items
    assert (item.mm_hash, item.identity, item.content["uuid"], item.content["type"]) == ("mine",) * 3 + ("image_url",)
    assert whole(job)["messages"][0]["content"][1]["image_url"] == data_url(PICTURE)


async def test_a_request_without_urls_is_left_alone() -> None:
    async with here() as it:
        for parts in ([], [part(image())], [{"type": "image_url", "image_url": {"url": "data:image/png,raw"}}]):
            job = await it(*parts)
            assert job.raw and it.host.asked == []


async def test_the_same_url_is_fetched_once_at_once_and_for_a_minute() -> None:
    async with here() as it:
        it.host.gate.clear()
        several = asyncio.gather(*(it(it.url(), it.url()) for _ in range(5)))
        await it.host.until_asked(1)
        it.host.gate.set()
        assert len({item.mm_hash for job in await several for item in job.items}) == 1
        it.now = 59.9
        await it(it.url())
        assert it.host.asked == ["/a"]
        it.now = 60.0
        await it(it.url())
        assert it.host.asked == ["/a", "/a"]


async def test_what_its_host_does_not_want_kept_is_not() -> None:
    async with here() as it:
        it.host.headers |= {"cache-control": "no-cache"}
        await it(it.url())
        await it(it.url())
        assert it.host.asked == ["/a", "/a"]


async def test_one_request_has_few_urls_on_their_way_at_once() -> None:
    async with here(most=64 << 20, room=64 << 20) as it:
        it.host.gate.clear()
        many = asyncio.create_task(it(*(it.url(f"/{n}") for n in range(20))))
        await it.host.until_asked(8)
        other = asyncio.create_task(it(it.url("/other")))
        await it.host.until_asked(9)
        assert it.host.asked[-1] == "/other"
        it.host.gate.set()
        await asyncio.gather(many, other)
        assert len(it.host.asked) == 21


async def test_tenants_share_nothing() -> None:
    async with here() as it:
        for tenant in (b"a", b"b", b"a"):
            await it(it.url(), identity=Identity(tenant))
        assert it.host.asked == ["/a", "/a"]


async def test_who_leaves_does_not_end_a_fetch_that_others_want() -> None:
    async with here() as it:
        it.host.gate.clear()
        leaving, staying = (asyncio.create_task(it(it.url())) for _ in range(2))
        await it.host.until_asked(1)
        leaving.cancel()
        await asyncio.sleep(0)
        it.host.gate.set()
        assert (await staying).items[0].mm_hash and it.host.asked == ["/a"]


async def test_failures_name_the_item_and_are_not_kept() -> None:
    async with here() as it:
        it.host.gate.clear()
        several = asyncio.gather(*(it(it.url(), it.url("/gone")) for _ in range(2)), return_exceptions=True)
        await it.host.until_asked(2)
        it.host.gate.set()
        found = await several
        for error in found:
            assert isinstance(error, BadRequest)
            assert (error.code, error.param) == ("media_unreachable", "messages[0].content[2]")
        assert found[0] is not found[1]
        with pytest.raises(BadRequest):
            await it(it.url("/gone"))
        assert it.host.asked.count("/gone") == 2


async def test_a_forbidden_address_is_told_as_such() -> None:
    async with here() as it:
        it.host.headers |= {"location": "http://10.0.0.1/"}
        it.it._fetching.rules = replace(RULES, networks=())
        with pytest.raises(ForbiddenMedia) as caught:
            await it(it.url())
        assert caught.value.param == "messages[0].content[1]"


async def test_bytes_of_one_request_and_pixels_are_bounded() -> None:
    async with here(most=3 * len(PICTURE)) as it:
        await it(it.url("/1"), it.url("/1"))
        with pytest.raises(BadRequest) as caught:
            await it(*(it.url(f"/{n}") for n in range(10)))
        assert (caught.value.status, caught.value.code) == (413, "body_too_large")
        with pytest.raises(BadRequest) as caught:
            await it(it.url("/1"), limits=Limits(rules=RULES, pixels=1280 * 720 - 1))
        assert caught.value.code == "too_many_pixels"


async def test_leaving_ends_what_is_on_its_way() -> None:
    async with here() as it:
        it.host.gate.clear()
        task = asyncio.create_task(it(it.url()))
        await it.host.until_asked(1)
        assert "1 on their way" in repr(it.it)
        task.cancel()
    assert "0 on their way" in repr(it.it)
    it.host.gate.set()


async def test_requests_that_are_not_over_hold_so_many_bytes_and_give_them_back() -> None:
    size = 4 * -(-len(PICTURE) // 3)
    async with here(kept=0, room=2 * size) as it:
        jobs = [await it(it.url(f"/{n}"), it.url(f"/{n}")) for n in range(3)]
        assert f" {3 * size} bytes there" in repr(it.it)
        with pytest.raises(Overloaded) as caught:
            await it(it.url("/3"))
        assert caught.value.status == 429
        assert (await it(part(image()))).raw, "who brings its media is served"
        jobs.clear()
        assert " 0 bytes there" in repr(it.it)
        await it(it.url("/4"))


def test_a_shelf_holds_so_many_bytes() -> None:
    shelf, size = Shelf(10_000), 3000 - 1024 - 1
    got = Fetched("data:image/png;base64,", memoryview(bytes(size)))
    for name in "abcd":
        shelf.keep((b"", name), got, 9.0)
        assert shelf.find((b"", "a"), 0.0) is got, "it was used last"
    assert [bool(shelf.find((b"", name), 0.0)) for name in "abcd"] == [True, False, True, True]
    shelf.keep((b"", "d"), Fetched("", memoryview(bytes(10_000))), 9.0)
    assert shelf.find((b"", "d"), 0.0) is None, "too large, and what it replaces is old"
    assert shelf.find((b"", "a"), 9.0) is None and shelf.find((b"", "a"), 0.0) is None
    assert repr(shelf) == "<Shelf 1 of 3000 bytes>"


async def test_nothing_is_kept_where_no_memory_is_set_aside() -> None:
    async with here(kept=0) as it:
        await it(it.url())
        await it(it.url())
        assert len(it.host.asked) == 2
