"""Media URLs that lead into one's own network, through a whole proxy: neither it nor an engine goes there."""

from __future__ import annotations

import base64
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import pytest

from proxy.media import resolving
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.media import chat, data_url, image
from tests.proxy.media.test_fetching import Host, hosted
from tests.support.names import Names, named

HERE = "127.0.0.0/8"


def about(*urls: str) -> dict[str, Any]:
    return chat(*({"type": "image_url", "image_url": {"url": url}} for url in urls))


def ask_by(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the proxy resolve what clients name by this name server; as getaddrinfo does, in a thread."""

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        answer = dns.query.udp(dns.message.make_query(host, "A"), "127.0.0.1", timeout=5, port=names.port)
        found = [record.address for rrset in answer.answer for record in rrset]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(resolving, "getaddrinfo", resolve)


@asynccontextmanager
async def proxied(mode: str, **settings: Any) -> AsyncIterator[tuple[Deployment, Host]]:
    async with hosted() as host, deployment("1e1p1d", media_urls=mode, **settings) as d:
        yield d, host


def unseen(d: Deployment, host: Host, answer: Answer, code: str = "media_forbidden") -> None:
    """No engine was asked and nobody was called."""
    assert (answer.error["code"], answer.error["stage"]) == (code, "proxy")
    assert answer.status == 403 if code == "media_forbidden" else 400
    assert host.asked == [] and not any(engine.calls for engine in d.engines)


@pytest.mark.parametrize("mode", ["engines", "fetch"])
@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.1", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "localhost"),
    ],
)
async def test_the_own_machine_in_every_spelling(mode: str, name: str) -> None:
    async with proxied(mode) as (d, host):
        unseen(d, host, await d.post(about(f"http://{name}:{host.port}/a.png")))


@pytest.mark.parametrize("mode", ["engines", "fetch"])
@pytest.mark.parametrize(
    "name", ["169.254.169.254", "[fd00:ec2::254]", "100.100.100.200", "168.63.129.16", "192.168.0.1", "10.0.0.1"]
)
async def test_metadata_services_and_private_networks(mode: str, name: str) -> None:
    async with proxied(mode, media_networks="172.16.0.0/12") as (d, host):
        unseen(d, host, await d.post(about(f"http://{name}/latest/meta-data/iam")))


@pytest.mark.parametrize("mode", ["engines", "fetch"])
@pytest.mark.parametrize("url", ["ftp://h.example/a", "gopher://h.example/", "/etc/passwd", "http://a@h.example/", "x"])
async def test_other_schemes_and_what_is_no_url(mode: str, url: str) -> None:
    async with proxied(mode) as (d, host):
        unseen(d, host, await d.post(about(url)), "invalid_media_url")


async def test_only_inline_media_where_urls_are_refused() -> None:
    async with proxied("refuse", media_networks=HERE) as (d, host):
        unseen(d, host, await d.post(about(f"{host.url}/a.png")))
        assert (await d.post(about(data_url(image())))).status == 200


@pytest.mark.parametrize("way", ["/away", "/hops/1"])
async def test_a_redirect_into_ones_own_network(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with named(h_example=lambda _: ["127.0.0.1"], inner_example=lambda _: ["10.0.0.1"]) as names:
        ask_by(names, monkeypatch)
        async with proxied("fetch", media_networks=HERE) as (d, host):
            host.other = f"http://inner.example:{host.port}/a.png"
            answer = await d.post(about(f"http://h.example:{host.port}{way}"))
            if way == "/away":
                assert (answer.status, answer.error["param"]) == (403, "messages[0].content[1]")
                assert [request.path for request in host.asked] == ["/away"]
            else:
                assert answer.status == 200


async def test_a_name_that_is_public_when_it_is_checked_and_private_when_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with named(rebind_example=lambda n: ["203.0.113.1"] if n == 0 else ["127.0.0.1"]) as names:
        ask_by(names, monkeypatch)
        async with proxied("fetch", media_networks="203.0.113.0/24", media_timeout=0.3) as (d, host):
            url = f"http://rebind.example:{host.port}/a.png"
            answer = await d.post(about(url))
            assert answer.error["code"] in ("media_timeout", "media_unreachable")
            assert names.asked["rebind.example"] == 1, "asked once, for the check and for the call"
            unseen(d, host, await d.post(about(url)))


async def test_what_is_fetched_reaches_engines_inline_and_once() -> None:
    async with proxied("fetch", media_networks=HERE) as (d, host):
        for _ in range(2):
            answer = await d.post(about(f"{host.url}/a.png?sig=1", f"{host.url}/a.png?sig=1"))
            assert answer.status == 200
        assert len(host.asked) == 1
        sent = [part for call in d.encoders[0].calls for part in call.body["messages"][0]["content"]]
        inline = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
        assert {part["image_url"]["url"] for part in sent} == {inline} and all(part["uuid"] for part in sent)
        assert "sig=1" not in str([call.body for engine in d.engines for call in engine.calls])


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("endless", 413, "media_too_large"),
        ("trickle", 400, "media_timeout"),
        ("gzip", 400, "media_type"),
        ("type/text/html", 400, "media_type"),
        ("loop", 400, "media_unreachable"),
        ("broken", 400, "media_unreachable"),
    ],
)
async def test_hosts_that_would_spend_the_proxys_memory_and_time(path: str, status: int, code: str) -> None:
    async with proxied("fetch", media_networks=HERE, max_media_bytes=1000, media_timeout=0.5) as (d, host):
        answer = await d.post(about(f"{host.url}/{path}"))
        assert (answer.status, answer.error["code"]) == (status, code)
        assert host.sent < 16 << 20 and not any(engine.calls for engine in d.engines)


@pytest.mark.parametrize("mode", ["engines", "fetch"])
async def test_files_lie_under_a_root_or_are_nobodys_business(mode: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(image())
    (tmp_path / "secret").write_bytes(b"secret")
    async with proxied(mode, media_roots=str(root)) as (d, host):
        for path in ("../secret", "%2e%2e/secret", "a.png/../../secret", "..%2fsecret", "%2fetc/passwd/../..", "a%00"):
            unseen(d, host, await d.post(about(f"file://{root}/{path}")))
        unseen(d, host, await d.post(about("file:///etc/passwd")))
        unseen(d, host, await d.post(about(f"file://elsewhere{root}/a.png")))
        assert (await d.post(about(f"file://{root}/a.png"))).status == 200


async def test_links_out_of_a_root_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc/hostname")
    (root / "folder").symlink_to("/etc")
    async with proxied("fetch", media_roots=str(root)) as (d, host):
        for name in ("link", "folder/hostname"):
            unseen(d, host, await d.post(about(f"file://{root}/{name}")))


async def test_parts_that_engines_know_and_the_proxy_does_not_are_no_way_around() -> None:
    async with proxied("engines") as (d, host):
        for part in (
            {"type": "input_image", "image_url": f"{host.url}/a.png"},
            {"type": "image_url", "image_url": {"url": data_url(image())}, "audio_url": {"url": host.url}},
            {"image_url": data_url(image()), "video_url": host.url},
        ):
            unseen(d, host, await d.post(chat(part)))
