"""The fleet by HTTP, with and without a key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.core import State
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat, image, part
from tests.fakes.native import Language


async def delete(d: Deployment, url: str | None, **headers: str) -> Any:
    params = {} if url is None else {"url": url}
    async with d.http.delete(d.url + "/instances", params=params, headers=headers) as response:
        return response.status, await response.json()


async def test_an_instance_joins_serves_drains_and_leaves() -> None:
    async with deployment("1b", probe_interval=0.05) as d, Language() as late:
        answer = await d.post({"role": "prefill_decode", "url": late.url + "/"}, "/instances")
        assert answer.json["registered"] and answer.json["instance"]["url"] == late.url
        instance = d.proxy.fleet.get(late.url)
        assert instance is not None
        async with asyncio.timeout(10):
            while instance.state is not State.READY:
                await asyncio.sleep(0.01)
        gate = late.gate = d.combined[0].gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await late.until(lambda: late.running == 1)
        shown = {i["url"]: i for i in (await d.get("/instances")).json["instances"]}
        assert shown[late.url].pop("pending_seconds") == pytest.approx(shown[late.url]["load"] * 25e-6)
        assert shown[late.url] | {"load": 0} == {
            "url": late.url,
            "role": "both",
            "listed_as": "both",
            "turning_to": None,
            "dialect": "native",
            "state": "READY",
            "reason": "healthy",
            "circuit": "CLOSED",
            "sources": ["registered"],
            "weight": 1.0,
            "model": "tiny",
            "facts": {"version": "0", "known_by": "GET /info says triptych both"},
            "leases": 1,
            "load": 0,
            "rate": {"seconds_per_token": 25e-6, "observations": 0},
        }
        assert (await d.post({"url": late.url}, "/instances/drain")).json["draining"]
        assert instance.state is State.DRAINING
        await d.proxy.health.tick()
        assert d.proxy.fleet.get(late.url) is instance, "it still has a request"
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]
        async with asyncio.timeout(10):
            while d.proxy.fleet.get(late.url) is not None:
                await asyncio.sleep(0.01)
        assert len(late.calls) == 1


async def test_what_was_learnt_of_each_instance_is_shown() -> None:
    async with deployment("1e1p1d") as d:
        for _ in range(2):
            assert (await d.post(chat(part(image())))).status == 200
        shown = {i["role"]: i for i in (await d.get("/instances")).json["instances"]}
        assert {role: one["rate"]["observations"] for role, one in shown.items()} == {
            "encode": 1,  # the second time it was believed to be there
            "prefill": 2,
            "decode": 1,  # one in four
        }
        assert shown["encode"]["items"] == 1
        assert shown["encode"]["pending_seconds"] == shown["prefill"]["pending_seconds"] == 0
        assert "pending_seconds" not in shown["decode"]


async def test_removing_lets_a_running_request_end() -> None:
    async with deployment("1b") as d:
        engine = d.combined[0]
        gate = engine.gate = asyncio.Event()
        asking = asyncio.create_task(d.post(chat()))
        await engine.until(lambda: engine.running == 1)
        assert await delete(d, engine.url) == (200, {"removed": True})
        assert await delete(d, engine.url) == (200, {"removed": False})
        assert (await d.post(chat())).status == 503
        gate.set()
        assert (await asking).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/instances", {"role": "chef", "url": "http://h:1"}, 400, "role"),
        ("/instances", {"role": "decode", "url": "h:1"}, 400, "url"),
        ("/instances", {"role": "decode"}, 400, "url"),
        ("/instances", {"role": "decode", "url": "http://h:1", "more": 1}, 400, "more"),
        ("/instances", {"role": "decode", "url": "magic+http://h:1"}, 400, "url"),
        ("/instances", {"role": "decode", "url": "http://h:1", "labels": {"moon": "m"}}, 400, "labels"),
        ("/instances", {"role": "decode", "url": "http://h:1", "weight": 0}, 400, "weight"),
        ("/instances", {"role": "decode", "url": "http://h:1", "ttl": -1}, 400, "ttl"),
        ("/instances", {"role": "decode", "url": "dns+http://h:1"}, 400, "url"),
        ("/instances", b"{", 400, None),
        ("/instances/drain", {"url": "http://h:1"}, 404, "url"),
    ],
)
async def test_mistakes_are_told(path: str, body: Any, status: int, param: str | None) -> None:
    async with deployment("1b") as d:
        answer = await d.post(body, path)
        assert (answer.status, answer.error["param"], answer.error["stage"]) == (status, param, "proxy")


async def test_an_instance_may_come_with_labels() -> None:
    async with deployment("1b") as d:
        asked = {"role": "both", "url": "http://h:1?rack=r1&host=h1", "labels": {"host": "h2", "zone": "z"}}
        answer = await d.post(asked, "/instances")
        assert answer.json["instance"]["facts"] == {"labels": {"rack": "r1", "host": "h2", "zone": "z"}}


async def test_an_instance_may_come_with_a_weight_and_a_key_that_nobody_is_shown() -> None:
    async with deployment("1b") as d:
        answer = await d.post({"role": "both", "url": "http://h:1", "weight": 2, "key": "s3cret"}, "/instances")
        assert answer.json["instance"]["weight"] == 2.0
        instance = d.proxy.fleet.get("http://h:1")
        assert instance is not None and instance.secret == "s3cret"
        assert b"s3cret" not in answer.body + (await d.get("/instances")).body


async def test_heartbeats_keep_an_instance_and_end_no_drain() -> None:
    async with deployment("1b") as d, Language() as late:
        beat = {"role": "both", "url": late.url, "ttl": 60, "life": "first"}
        assert (await d.post(beat, "/instances")).json["registered"]
        await d.proxy.health.tick()
        instance = d.proxy.fleet.get(late.url)
        assert instance is not None and instance.state is State.READY
        assert (await d.post(beat, "/instances")).json["instance"]["state"] == "READY"
        await d.post({"url": late.url}, "/instances/drain")
        await d.proxy.health.tick()
        answer = await d.post(beat, "/instances")
        assert answer.json == {"registered": False, "instance": None}, "an admin has drained this process"
        assert (await d.get("/instances")).json["held"] == {late.url: ["registered"]}
        answer = await d.post({**beat, "life": "second"}, "/instances")
        assert answer.json["registered"] and answer.json["instance"]["state"] == "JOINING"
        assert (await delete(d, late.url))[1] == {"removed": True}


async def test_a_known_instance_keeps_its_role() -> None:
    async with deployment("1b") as d:
        answer = await d.post({"role": "encode", "url": d.combined[0].url}, "/instances")
        assert (answer.status, answer.error["code"]) == (409, "conflict")


async def test_changes_need_the_key_and_looking_does_not() -> None:
    async with deployment("1b", admin_key="s3cret") as d:
        url = d.combined[0].url
        registration = {"role": "both", "url": url}
        assert (await d.get("/instances")).status == 200
        assert (await d.post(registration, "/instances")).status == 401
        assert (await d.post(registration, "/instances", x_api_key="wrong")).status == 401
        assert (await d.post({"url": url}, "/instances/drain")).error["type"] == "authentication_error"
        assert (await delete(d, url))[0] == 401
        assert (await d.post(registration, "/instances", x_api_key="s3cret")).status == 200
        assert (await d.post(registration, "/instances", authorization="Bearer s3cret")).status == 200
        assert (await delete(d, None, **{"X-API-Key": "s3cret"}))[0] == 400


async def test_engines_have_a_key_of_their_own_for_themselves() -> None:
    async with deployment("1b", admin_key="s3cret", register_key="engines") as d:
        url = "http://h:1"
        forever = {"role": "both", "url": url}
        assert (await d.post(forever, "/instances", x_api_key="engines")).status == 401
        assert (await d.post({**forever, "ttl": 9}, "/instances", x_api_key="wrong")).status == 401
        assert (await d.post({**forever, "ttl": 9}, "/instances", x_api_key="engines")).status == 200
        assert (await d.post({"url": d.combined[0].url}, "/instances/drain", x_api_key="engines")).status == 401
        assert (await d.post({"url": url}, "/instances/drain", x_api_key="engines")).status == 200
        assert (await delete(d, url, **{"X-API-Key": "engines"}))[0] == 401
        assert (await delete(d, url, **{"X-API-Key": "s3cret"}))[0] == 200


async def test_without_an_admin_key_the_engines_key_locks_all() -> None:
    async with deployment("1b", register_key="engines") as d:
        registration = {"role": "both", "url": "http://h:1"}
        assert (await d.post(registration, "/instances")).status == 401
        assert (await d.post(registration, "/instances", x_api_key="engines")).status == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [
        ({"sec_fetch_site": "cross-site", "origin": "http://evil.test"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"origin": "http://evil.test"}, 403),  # a browser that calls by plain HTTP says no more
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "same-origin", "origin": "https://front.test"}, 404),
        ({"sec_fetch_site": "none"}, 404),
        ({}, 404),
    ],
)
async def test_without_keys_pages_of_other_sites_change_nothing(site: dict[str, str], status: int) -> None:
    async with deployment("1b") as d:
        answer = await d.post({"url": "http://127.0.0.1:9"}, "/instances/drain", **site)
        assert answer.status == status
        own = await d.post({"url": "http://127.0.0.1:9"}, "/instances/drain", origin=d.url)
        assert own.status == 404


async def test_who_has_the_key_may_be_on_any_site() -> None:
    async with deployment("1b", admin_key="secret") as d:
        answer = await d.post({"url": "http://x:9"}, "/instances/drain", origin="http://ops.test", x_api_key="secret")
        assert answer.status == 404
