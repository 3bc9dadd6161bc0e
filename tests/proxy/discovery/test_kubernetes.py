"""Engines behind EndpointSlices, as a scripted API server tells of them over real sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from proxy.discovery import finder
from proxy.discovery.base import Unreadable
from proxy.settings import Endpoint, ProxySettings
from tests.support.api_server import ApiServer, api_server, endpoint, endpoints
from tests.support.waiting import until

NAME = "k8s+http://prod?selector=app=enc&port=http"


class Watch:
    """What was said of a name."""

    def __init__(self, api: ApiServer, credentials: Path, text: str) -> None:
        settings = ProxySettings(
            register_key="k", kubernetes_api=api.url + "/", kubernetes_credentials=credentials / "account"
        )
        self.said: list[list[str]] = []
        self.task = asyncio.create_task(finder("k8s", settings).watch(Endpoint.parse(text, "auto"), self._say))

    def _say(self, found: Iterable[str]) -> None:
        self.said.append([*found])

    async def says(self, *netlocs: str) -> None:
        """Wait until these are what it said last."""
        await until(lambda: self.task.done() or (self.said and self.said[-1] == [*netlocs]))
        assert self.said and self.said[-1] == [*netlocs]


@asynccontextmanager
async def watching(api: ApiServer, folder: Path, text: str = NAME) -> AsyncIterator[Watch]:
    watch = Watch(api, folder, text)
    try:
        yield watch
    finally:
        watch.task.cancel()
        await asyncio.wait([watch.task])


async def test_slices_are_listed_and_then_watched(tmp_path: Path) -> None:
    async with api_server() as api:
        api.put("a", *endpoints("10.0.0.2", "10.0.0.1"))
        api.put("other", *endpoints("10.9.9.9"), labels="app=web")
        async with watching(api, tmp_path) as watch:
            await watch.says("10.0.0.1:8000", "10.0.0.2:8000")
            await until(lambda: api.watches == 1)
            api.put("b", *endpoints("10.0.1.1"))
            await watch.says("10.0.0.1:8000", "10.0.0.2:8000", "10.0.1.1:8000")
            api.put("a", *endpoints("10.0.0.2"))
            await watch.says("10.0.0.2:8000", "10.0.1.1:8000")
            api.delete("b")
            await watch.says("10.0.0.2:8000")
            assert api.lists == 1


async def test_a_watch_that_ends_goes_on_from_where_it_was(tmp_path: Path) -> None:
    async with api_server() as api, watching(api, tmp_path) as watch:
        await watch.says()
        await until(lambda: api.watches == 1)
        api.put("a", *endpoints("10.0.0.1"))
        await watch.says("10.0.0.1:8000")
        api.bookmark()
        api.end()
        await until(lambda: api.watches == 2)  # the server checks the version
        api.put("a")
        await watch.says()
        assert api.lists == 1


async def test_a_past_that_is_forgotten_is_listed_again(tmp_path: Path) -> None:
    async with api_server() as api, watching(api, tmp_path) as watch:
        await until(lambda: api.watches == 1)
        api.error(410, "too old resource version")
        async with asyncio.timeout(10):
            await watch.task  # whoever runs it begins again


async def test_who_is_not_ready_or_leaves_is_not_listed(tmp_path: Path) -> None:
    async with api_server() as api:
        api.put(
            "a",
            endpoint("10.0.0.1"),
            endpoint("10.0.0.2", ready=False),
            endpoint("10.0.0.3", ready=False, serving=True, terminating=True),
            {"addresses": ["10.0.0.4"]},  # unknown counts as ready
        )
        async with watching(api, tmp_path) as watch:
            await watch.says("10.0.0.1:8000", "10.0.0.4:8000")


async def test_a_pod_with_two_families_of_addresses_is_one_engine(tmp_path: Path) -> None:
    async with api_server() as api:
        api.put("a6", endpoint("fd00::1", uid="p1"), endpoint("fd00::2", uid="p2"), addressType="IPv6")
        api.put("a4", endpoint("10.0.0.1", uid="p1"))
        async with watching(api, tmp_path) as watch:
            await watch.says("10.0.0.1:8000", "[fd00::2]:8000")


@pytest.mark.parametrize(
    ("port", "ports", "found"),
    [
        ("&port=http", [{"name": "http", "port": 1}, {"name": "metrics", "port": 2}], ["10.0.0.1:1"]),
        ("&port=7", [{"name": "http", "port": 1}], ["10.0.0.1:7"]),
        ("", [{"name": "", "port": 3}], ["10.0.0.1:3"]),
        ("", [{"name": "http", "port": 1}, {"name": "metrics", "port": 2}], []),
        ("&port=grpc", [{"name": "http", "port": 1}], []),
        ("&port=grpc", None, []),
    ],
)
async def test_the_port_is_the_one_asked_for(
    tmp_path: Path, port: str, ports: list[dict[str, object]], found: list[str]
) -> None:
    async with api_server() as api:
        api.put("a", *endpoints("10.0.0.1"), ports=ports)
        async with watching(api, tmp_path, f"k8s+http://prod?selector=app%3Denc{port}") as watch:
            await watch.says(*found)


async def test_the_pods_own_account_is_shown_over_tls(tmp_path: Path) -> None:
    authority, account = trustme.CA(), tmp_path / "account"
    account.mkdir()
    authority.cert_pem.write_to_path(str(account / "ca.crt"))
    (account / "token").write_text("t0ken\n")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(tls)
    async with api_server("t0ken", tls) as api:
        api.put("a", *endpoints("10.0.0.1"))
        async with watching(api, tmp_path) as watch:
            await watch.says("10.0.0.1:8000")
        (account / "token").write_text("old")
        async with watching(api, tmp_path) as watch:
            with pytest.raises(Unreadable, match="answers 401: Unauthorized"):
                await watch.task


async def test_a_refusal_is_told_in_the_servers_words(tmp_path: Path) -> None:
    async with api_server() as api:
        api.refuses = 403, "endpointslices is forbidden"
        async with watching(api, tmp_path) as watch:
            with pytest.raises(Unreadable, match="answers 403: endpointslices is forbidden"):
                await watch.task
            assert watch.said == []
        api.refuses = None
        async with watching(api, tmp_path) as watch:
            await until(lambda: api.watches == 1)
            api.error(500, "etcd is away")
            with pytest.raises(Unreadable, match="etcd is away"):
                await watch.task


async def test_nobody_there_is_no_answer(tmp_path: Path) -> None:
    async with api_server() as api:
        pass
    async with watching(api, tmp_path) as watch:
        with pytest.raises(Unreadable, match="cannot be reached"):
            await watch.task
        assert watch.said == []


async def test_what_is_no_list_is_not_understood(tmp_path: Path) -> None:
    """Whatever stands in the way of the API server may answer in JSON as well."""
    async with api_server() as api:
        api.answers = {"metadata": {"resourceVersion": "1"}, "items": None}  # as Go writes an empty list
        async with watching(api, tmp_path) as watch:
            await watch.says()
        for odd in ([], {}, {"items": [{"metadata": {}}]}, {"items": [3], "metadata": {"resourceVersion": "1"}}):
            api.answers = odd
            async with watching(api, tmp_path) as watch:
                with pytest.raises(Unreadable, match="tells of no EndpointSlices"):
                    await watch.task
                assert watch.said == []
