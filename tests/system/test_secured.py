"""Real engines and a proxy that trust nobody by default: every call, both ways, over TLS with certificates and keys."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from engines.encoder.app import build as encoder
from engines.language.build import build as language
from engines.serve import running
from engines.settings import EncoderSettings, LanguageSettings
from proxy.app import Proxy
from proxy.auth.keys import made
from proxy.core import State
from proxy.settings import ProxySettings
from tests.fakes.media import chat, image, part
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.tls import Authority


async def test_an_image_is_described_by_engines_that_know_whom_they_serve(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    key, digest = made(bytes(32))
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: acme, hash: '{digest}'}}")

    def secured(name: str) -> dict[str, Any]:
        files = ca.files(name, ca=ca.path)
        return {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": ca.path}

    def engine(name: str) -> dict[str, Any]:
        of_all = {"model": checkpoint(FAMILIES[0]), "host": "127.0.0.1", "port": 0, "transfer": "shm", "threads": 1}
        return of_all | secured(name) | {"key": "engines'", "proxy_ca": ca.path, "served_model_name": "tiny"}

    async with AsyncExitStack() as stack:
        urls = []
        one = EncoderSettings(**engine("e"))
        urls.append(await stack.enter_async_context(running(await stack.enter_async_context(encoder(one)), one)))
        for role in ("prefill", "decode"):
            other = LanguageSettings(**engine(role), role=role)
            app = await stack.enter_async_context(language(other))
            urls.append(await stack.enter_async_context(running(app, other)))
        shown = ca.files("me", "me")
        settings = ProxySettings(
            **dict(zip(("encode_servers_urls", "prefill_servers_urls", "decode_servers_urls"), urls, strict=True)),
            host="127.0.0.1",
            port=0,
            admin_port=0,
            admin_key="s3cret",
            api_keys=keys,
            **secured("proxy"),
            engine_ca=ca.path,
            engine_cert=shown.cert,
            engine_cert_key=shown.key,
            engine_key="engines'",
            kv_handoff="push",
        )
        proxy = Proxy(settings)
        await stack.enter_async_context(proxy.serving())
        await proxy.health.tick()
        assert all(i.state is State.READY for i in proxy.fleet), [i.reason for i in proxy.fleet]
        http = await stack.enter_async_context(aiohttp.ClientSession())
        ask = {
            "url": f"{proxy.url}/v1/chat/completions",
            "json": chat(part(image()), max_tokens=4),
            "ssl": ca.trusting(shown),
        }
        async with http.post(**ask, headers={"authorization": f"Bearer {key}"}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-triptych-route"].startswith("E-P-D")
            assert (await response.json())["usage"]["completion_tokens"] == 4
        async with http.post(**ask) as response:
            assert response.status == 401
        async with http.get(f"{urls[1]}/info", ssl=ca.trusting(shown)) as response:
            assert response.status == 401, "a client goes through the proxy"
