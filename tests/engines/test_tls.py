"""Certificates of an engine on real connections, replaced while it serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engines import tls
from engines.errors import SetupError
from engines.language.metaserver import Metaserver
from engines.serve import running
from engines.settings import EngineSettings
from tests.engines.test_serve import Toy
from tests.support.tls import Authority


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(model=Path("/models/toy"), port=0, **changes)


async def health(url: str, context: Any) -> int:
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"{url}/health", ssl=context) as answer,
    ):
        return answer.status


async def test_it_serves_with_its_certificate_and_with_the_one_that_replaces_it(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files = old.files("engine")
    async with running(Toy(), settings(tls_cert=files.cert, tls_key=files.key)) as url:
        assert url.startswith("https://")
        assert await health(url, old.trusting()) == 200
        new.files("engine")
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await health(url, old.trusting())
        assert await health(url, new.trusting()) == 200


async def test_a_bad_file_changes_nothing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = Authority(tmp_path)
    files = ca.files("engine")
    assert files.cert is not None
    async with running(Toy(), settings(tls_cert=files.cert, tls_key=files.key)) as url:
        files.cert.write_text("half a certif")
        with caplog.at_level(logging.ERROR, "engines.tls"):
            for _ in range(3):
                assert await health(url, ca.trusting()) == 200
        assert len(caplog.records) == 1 and str(files.cert) in caplog.text


async def test_clients_show_a_certificate_where_one_is_asked_for_even_if_its_authority_is_new(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files, mine = old.files("engine"), old.files("me", "me")
    asked = tmp_path / "clients.pem"
    asked.write_bytes(old.path.read_bytes())
    async with running(Toy(), settings(tls_cert=files.cert, tls_key=files.key, tls_client_ca=asked)) as url:
        with pytest.raises(aiohttp.ClientError):
            await health(url, old.trusting())
        assert await health(url, old.trusting(mine)) == 200
        asked.write_bytes(new.path.read_bytes())
        with pytest.raises(aiohttp.ClientError):
            await health(url, old.trusting(mine))
        assert await health(url, old.trusting(new.files("me", "me"))) == 200


@asynccontextmanager
async def proxy(context: Any) -> AsyncIterator[str]:
    """One that takes any descriptor."""

    async def take(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    app.router.add_post("/v1/metaserver", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}/v1/metaserver"
    await runner.cleanup()


async def test_an_https_proxy_is_called_if_its_authority_is_trusted(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    theirs, mine = ca.files("proxy", ca=ca.path), ca.files("engine")
    listening = tls.listener(settings(tls_cert=theirs.cert, tls_key=theirs.key, tls_client_ca=theirs.ca))
    calls = tls.calls(settings(proxy_ca=ca.path, tls_cert=mine.cert, tls_key=mine.key))
    async with proxy(listening) as url, aiohttp.ClientSession() as session:
        await Metaserver(session, 5.0, calls).call(url, {"request_id": "x"})
        with pytest.raises(Exception, match="certificate verify failed"):
            await Metaserver(session, 5.0).call(url, {"request_id": "x"})
    assert tls.calls(settings()) is None


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    files = Authority(tmp_path).files("engine")
    for changes, says in (
        ({"tls_cert": tmp_path / "gone.pem"}, r"gone\.pem: No such file"),
        ({"tls_cert": files.cert, "tls_key": files.cert}, r"engine\.crt, .*engine\.crt: "),
        ({"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.key}, r"engine\.key: "),
    ):
        with pytest.raises(SetupError, match=says):
            tls.listener(settings(**changes))
    with pytest.raises(SetupError, match=r"gone\.pem"):
        tls.calls(settings(proxy_ca=tmp_path / "gone.pem"))
