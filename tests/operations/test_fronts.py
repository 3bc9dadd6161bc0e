"""Two proxies behind the nginx and the Envoy that we ship configurations for: real ones, over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import io
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from bench.scripted.candidates import free_port
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.fakes.native import Encoder, Engine, Language
from tests.support.crowd import Crowd, crowd
from tests.support.waiting import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
PROXIES = ("proxy-1", "proxy-2")
CHAT = "/v1/chat/completions"

Find = Callable[[str], str]


@dataclass
class Front:
    """What clients see."""

    url: str
    trusting: ssl.SSLContext
    http: aiohttp.ClientSession

    async def ask(self, body: Any, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        data = io.BytesIO(json.dumps(body).encode())
        typed = {"content-type": "application/json", **headers}
        async with self.http.post(self.url + CHAT, data=data, headers=typed) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            return answer.status, await answer.json(content_type=None)


def _rewritten(text: str, places: Mapping[str, str]) -> str:
    for old, new in places.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def _nginx(find: Find, folder: Path, ports: Sequence[int], port: int) -> list[str]:
    places = {
        **{f"{name}:8000": f"127.0.0.1:{at}" for name, at in zip(PROXIES, ports, strict=True)},
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/nginx/tls": str(folder),
    }
    (folder / "triptych.conf").write_text(_rewritten((DEPLOY / "nginx/triptych.conf").read_text(), places))
    temporary = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    (folder / "nginx.conf").write_text(
        f"daemon off; user {getpass.getuser()}; worker_processes 1; pid {folder}/pid; events {{}}\n"
        f"http {{ access_log off; {' '.join(temporary)} include {folder}/triptych.conf; }}"
    )
    return [find("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]


def _envoy(find: Find, folder: Path, ports: Sequence[int], port: int) -> list[str]:
    places = {
        **{
            f"address: {name}, port_value: 8000": f"address: 127.0.0.1, port_value: {at}"
            for name, at in zip(PROXIES, ports, strict=True)
        },
        "address: 0.0.0.0, port_value: 443": f"address: 127.0.0.1, port_value: {port}",
        "address: 127.0.0.1, port_value: 9901": "address: 127.0.0.1, port_value: 0",
        "/etc/envoy/tls": str(folder),
    }
    (folder / "envoy.yaml").write_text(_rewritten((DEPLOY / "envoy/envoy.yaml").read_text(), places))
    command = [find("envoy"), "--config-path", str(folder / "envoy.yaml"), "--concurrency", "1"]
    return [*command, "--use-dynamic-base-id", "--log-level", "warning"]


COMMANDS = {"nginx": _nginx, "envoy": _envoy}


@pytest.fixture
def find(part: Find) -> Find:
    """`part`, and what comes with this Python."""

    def found(name: str) -> str:
        here = Path(sys.executable).with_name(name)
        return str(here) if here.exists() else part(name)

    return found


@contextlib.asynccontextmanager
async def front(kind: str, find: Find, folder: Path, ports: Sequence[int]) -> AsyncIterator[Front]:
    """One that answers, before proxies on `ports`; they need not be there."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    port, log = free_port(), folder / "log"
    with log.open("wb") as out:
        command = COMMANDS[kind](find, folder, ports, port)
        process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting, limit=0)) as http:
                found = Front(f"https://127.0.0.1:{port}", trusting, http)

                async def answers() -> bool:
                    assert process.returncode is None, log.read_text()
                    with contextlib.suppress(aiohttp.ClientError):
                        return (await found.get("/nowhere"))[0] == 404
                    return False

                await eventually(answers, 20)
                yield found
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@dataclass
class Site:
    front: Front
    proxies: list[Crowd]
    engine: Language
    encoder: Encoder


def _port(proxy: Crowd) -> int:
    return int(proxy.url.rpartition(":")[2])


@contextlib.asynccontextmanager
async def _proxies(folder: Path, engine: Engine, encoder: Engine) -> AsyncIterator[list[Crowd]]:
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for name in PROXIES:
            (folder / name).mkdir()
            urls = ("--encode-servers-urls", encoder.url, "--decode-servers-urls", engine.url)
            found.append(await stack.enter_async_context(crowd(folder / name, 1, *urls)))
        yield found


@pytest.fixture(params=COMMANDS)
async def site(request: pytest.FixtureRequest, find: Find, tmp_path: Path) -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        engine, encoder = await stack.enter_async_context(Language()), await stack.enter_async_context(Encoder())
        proxies = await stack.enter_async_context(_proxies(tmp_path, engine, encoder))
        found = await stack.enter_async_context(front(request.param, find, tmp_path, [_port(each) for each in proxies]))
        yield Site(found, proxies, engine, encoder)


async def test_an_answer_passes_whole_with_its_headers(site: Site) -> None:
    status, answer, headers = await site.front.ask(chat(part(image(1200, 900, "BMP"))), **{"x-request-id": "mine"})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "".join(site.engine.pieces)
    assert headers["x-request-id"] == "mine"
    assert headers["x-triptych-route"].startswith("E-PD")
    assert site.engine.calls[-1].id == "mine"


async def test_both_proxies_are_asked(site: Site) -> None:
    assert {(await site.front.ask(chat()))[0] for _ in range(20)} == {200}
    counted = [await proxy.metrics() for proxy in site.proxies]
    assert all(metrics["triptych_requests_total", "PD", "200"] for metrics in counted)


async def test_a_token_passes_before_the_next_is_there(site: Site) -> None:
    site.engine.fail(Fault(Kind.STALL, after=2))
    async with site.front.http.post(site.front.url + CHAT, json=chat(stream=True)) as answer:
        assert answer.status == 200
        async with asyncio.timeout(10):
            await answer.content.readuntil(site.engine.pieces[1].encode())
        assert site.engine.running == 1, "it is still being written"


async def test_who_hangs_up_frees_the_engine(site: Site) -> None:
    site.engine.gate = asyncio.Event()
    body = json.dumps(chat(stream=True))
    host, port = site.front.url.removeprefix("https://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=site.front.trusting)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    await site.engine.until(lambda: site.engine.running == 1)
    writer.transport.abort()  # as a process that ends; a polite close of TLS waits for nginx, which is not reading
    await site.engine.until(lambda: site.engine.aborted == 1)


async def test_the_proxies_errors_pass_as_they_are(site: Site) -> None:
    status, answer, _ = await site.front.ask({"model": "tiny", "messages": "none"})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    await site.engine.stop()
    for proxy in site.proxies:
        await eventually(lambda proxy=proxy: _down(proxy, site.engine))  # type: ignore[misc]
    for _ in range(10):
        status, answer, headers = await site.front.ask(chat())
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "no_instance", "1")


async def _down(proxy: Crowd, engine: Engine) -> bool:
    return bool((await proxy.instances())[engine.url]["state"] == "DOWN")


@pytest.mark.parametrize("path", ["/metrics", "/instances", "/plan", "/requests", "/ui", "/v1/metaserver", "/"])
async def test_what_is_not_for_clients_is_not_there(site: Site, path: str) -> None:
    status, answer = await site.front.get(path)
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")


async def test_a_proxy_can_stop_at_any_time(site: Site) -> None:
    """Not one request of a crowd fails while a proxy ends, with requests in flight on both."""
    statuses: list[int] = []
    site.engine.gate = asyncio.Event()

    async def crowd_of(count: int) -> None:
        for _ in range(count):
            statuses.append((await site.front.ask(chat()))[0])

    asking = [asyncio.create_task(crowd_of(12)) for _ in range(8)]
    await site.engine.until(lambda: site.engine.running == 8)
    stopping = asyncio.create_task(site.proxies[0].stop())
    await asyncio.sleep(0)
    site.engine.gate.set()
    assert await stopping == 0
    await asyncio.gather(*asking)
    assert statuses == [200] * 96


async def test_a_lost_proxy_is_no_loss(site: Site) -> None:
    site.proxies[0].process.kill()
    await site.proxies[0].process.wait()
    answers = [await site.front.ask(chat()) for _ in range(20)]
    assert [(status, answer) for status, answer, _ in answers if status != 200] == []


@pytest.mark.parametrize("kind", COMMANDS)
async def test_without_any_proxy_the_answer_is_still_ours(kind: str, find: Find, tmp_path: Path) -> None:
    async with front(kind, find, tmp_path, [free_port(), free_port()]) as found:
        status, answer, _ = await found.ask(chat())
        assert status == 503
        assert answer["error"]["type"] == "service_unavailable"
        assert answer["error"]["retryable"] is True
