"""The lists of language servers, over real sockets."""

from __future__ import annotations

import ssl
from pathlib import Path

from aiohttp import web

from proxy.sglang.enrolment import Enrolment
from proxy.tls import Listener
from tests.support.tls import Authority
from tests.support.waiting import until


class Bootstrap:
    """An encoder bootstrap server. `status` is what it answers."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.urls: list[str] = []
        self.status = 200
        self.asked = 0
        self.port = 0

    async def __aenter__(self) -> Bootstrap:
        app = web.Application()
        app.add_routes(
            [web.post("/register_encoder_url", self._add), web.delete("/unregister_encoder_url", self._remove)]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self._tls).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def _add(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.status == 200:
            self.urls.append((await request.json())["url"])
        return web.Response(status=self.status)

    async def _remove(self, request: web.Request) -> web.Response:
        self.urls.remove((await request.json())["url"])
        return web.Response()


async def test_it_is_on_every_list_while_it_lasts_and_on_none_afterwards() -> None:
    async with Bootstrap() as one, Bootstrap() as two:
        enrolment = Enrolment([one.url, two.url], None)
        async with enrolment.kept("0.0.0.0", 7):
            await until(lambda: bool(one.urls and two.urls))
            assert one.urls == two.urls == ["http://127.0.0.1:7"], "the address that leads there"
            await until(lambda: repr(enrolment) == "<Enrolment on 2 of 2 lists>")
        assert one.urls == two.urls == []


async def test_what_it_is_called_can_be_said() -> None:
    async with Bootstrap() as one:
        async with Enrolment([one.url], "http://proxy.example:9000").kept("0.0.0.0", 7):
            await until(lambda: bool(one.urls))
            assert one.urls == ["http://proxy.example:9000"]
        async with Enrolment([one.url], None).kept("::1", 7):
            await until(lambda: bool(one.urls))
            assert one.urls == ["http://[::1]:7"]


async def test_lists_may_be_reached_by_tls(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    async with Bootstrap(Listener(ca.files("list")).context) as one:
        async with Enrolment([one.url], None, ca.trusting).kept("127.0.0.1", 7):
            await until(lambda: bool(one.urls))
        assert one.urls == []


async def test_a_list_that_is_not_there_or_does_not_want_to_fails_nobody() -> None:
    async with Bootstrap() as gone:
        pass
    async with Bootstrap() as unwilling:
        unwilling.status = 500
        enrolment = Enrolment([gone.url, unwilling.url], None)
        async with enrolment.kept("127.0.0.1", 7):
            await until(lambda: unwilling.asked > 0)
            assert repr(enrolment) == "<Enrolment on 0 of 2 lists>"
