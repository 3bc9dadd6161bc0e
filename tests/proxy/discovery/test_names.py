"""Engines by the records of a real name server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bench.scripted.names import Names, naming
from proxy.discovery import finder
from proxy.discovery.base import Unreadable
from proxy.settings import Endpoint, ProxySettings


def settings(names: Names, **changes: Any) -> ProxySettings:
    return ProxySettings(register_key="k", dns_server=names.address, discovery_interval=0.01, **changes)


async def first(names: Names, text: str) -> list[str]:
    """What is said first of a name."""
    endpoint = Endpoint.parse(text, "auto")
    said: asyncio.Queue[list[str]] = asyncio.Queue()
    watching = asyncio.create_task(
        finder(endpoint.finder, settings(names)).watch(endpoint, lambda found: said.put_nowait([*found]))
    )
    getting = asyncio.create_task(said.get())
    async with asyncio.timeout(10):
        await asyncio.wait([watching, getting], return_when=asyncio.FIRST_COMPLETED)
    if not getting.done():
        getting.cancel()
        await watching
    watching.cancel()
    return getting.result()


async def test_every_address_of_a_name_is_an_engine() -> None:
    async with naming() as names:
        names.records["enc.test", "A"] = ["10.0.0.2", "10.0.0.1"]
        names.records["enc.test", "AAAA"] = ["fd00::1"]
        assert await first(names, "dns+http://enc.test:80") == ["10.0.0.1:80", "10.0.0.2:80", "[fd00::1]:80"]


async def test_services_have_ports_and_the_first_priority_alone_counts() -> None:
    async with naming() as names:
        names.records["a.test", "A"] = ["10.0.0.1", "10.0.0.2"]
        names.records["b.test", "AAAA"] = ["fd00::2"]
        names.records["_e._tcp.test", "SRV"] = [
            *("1 5 8001 a.test.", "1 0 8002 b.test.", "1 0 8003 10.0.0.9.", "2 0 8004 c.test."),
        ]
        found = await first(names, "srv+http://_e._tcp.test")
        assert found == ["10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.9:8003", "[fd00::2]:8002"]
        names.records["_e._tcp.test", "SRV"] = ["0 0 0 ."]
        assert await first(names, "srv+http://_e._tcp.test") == [], "decidedly not available"


async def test_more_addresses_than_a_datagram_holds() -> None:
    async with naming() as names:
        names.records["enc.test", "A"] = [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(400)]
        assert len(await first(names, "dns+http://enc.test:80")) == 400


async def test_what_does_not_exist_has_nobody_behind_it() -> None:
    async with naming() as names:
        assert await first(names, "dns+http://enc.test:80") == []
        assert await first(names, "srv+http://_e._tcp.test") == []


@pytest.mark.parametrize("text", ["dns+http://enc.test:80", "srv+http://_e._tcp.test"])
async def test_a_name_server_that_fails_has_said_nothing(text: str) -> None:
    async with naming() as names:
        names.failing = True
        with pytest.raises(Unreadable, match=r"(A|SRV) of (enc|_e._tcp).test: .*SERVFAIL"):
            await first(names, text)


async def test_a_name_is_asked_again_and_again() -> None:
    async with naming() as names:
        names.records["enc.test", "A"] = ["10.0.0.1"]
        endpoint = Endpoint.parse("dns+http://enc.test:80", "auto")
        said: list[list[str]] = []
        changed = asyncio.Event()

        def say(found: Any) -> None:
            said.append([*found])
            names.records["enc.test", "A"] = [f"10.0.0.{len(said) + 1}"]
            if len(said) == 3:
                changed.set()

        watching = asyncio.create_task(finder("dns", settings(names)).watch(endpoint, say))
        async with asyncio.timeout(10):
            await changed.wait()
        watching.cancel()
        assert said[:3] == [["10.0.0.1:80"], ["10.0.0.2:80"], ["10.0.0.3:80"]]


@pytest.mark.parametrize("text", ["dns+http://enc.test:80", "srv+http://_e._tcp.test"], ids=["dns", "srv"])
async def test_a_watch_that_is_ended_as_its_answer_comes_ends(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint.parse(text, "auto")
    async with naming() as names:
        answered, answer = asyncio.Event(), names.datagram_received

        def datagram_received(data: bytes, addr: tuple[str, int]) -> None:
            answer(data, addr)
            answered.set()

        monkeypatch.setattr(names, "datagram_received", datagram_received)
        for turns in range(12):  # of the event loop, in one of which the answer is there and not yet taken
            watching = asyncio.create_task(finder(endpoint.finder, settings(names)).watch(endpoint, lambda _: None))
            answered.clear()
            await answered.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            watching.cancel()
            await asyncio.wait([watching], timeout=1)
            assert watching.cancelled(), f"it goes on, ended {turns} turns after an answer"
