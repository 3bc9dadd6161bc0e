"""The way from one role to another: what it waits for, what it refuses meanwhile, and what undoes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from engines.errors import BadRequest, DeadlineExceeded, OtherRole
from engines.language.build import build
from engines.language.descriptors import Publish
from engines.language.engine import Stats
from engines.language.metrics import Metrics
from engines.language.roles import Roles, asked
from engines.serve import running
from tests.engines.language.test_app import MESSAGES, Engine, settings, wanted
from tests.support.waiting import until

PUBLISH = {"do_remote_decode": True, "do_remote_prefill": False}


async def nothing_owed() -> None:
    pass


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "role"),
        ({"role": "encode"}, "role"),
        ({"role": ["both"]}, "role"),
        ({"role": "both", "timeout": 0}, "timeout"),
        ({"role": "both", "timeout": True}, "timeout"),
        ({"role": "both", "timeout": "1"}, "timeout"),
        ({"role": "both", "timeout": float("nan")}, "timeout"),
    ],
    ids=str,
)
def test_mistakes_are_told(body: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(body, 60.0)
    assert caught.value.param == param


def test_the_flag_is_the_longest_wait() -> None:
    waits = [asked({"role": "decode", **more}, 60.0)[1] for more in ({}, {"timeout": 5}, {"timeout": 99})]
    assert waits == [60.0, 5, 60.0]


async def test_it_waits_for_what_is_in_flight_and_refuses_what_is_new() -> None:
    owed = asyncio.Event()

    async def settled() -> None:
        await owed.wait()

    roles = Roles("prefill", settled)
    metrics = Metrics(CollectorRegistry(), Stats)
    metrics.follow(roles)
    with roles.serving():
        switch = asyncio.create_task(roles.switch("decode", 60))
        await until(lambda: roles.next == "decode")
        assert (roles.now, roles.stage) == ("prefill", "prefill")
        assert repr(roles) == "<Roles prefill on its way to decode, 1 in flight>"
        with pytest.raises(OtherRole, match="turns from prefill to decode: send") as caught, roles.serving():
            pass
        assert (caught.value.status, caught.value.retryable) == (503, True)
        with pytest.raises(OtherRole, match="already"):
            await roles.switch("both", 60)
        assert roles.plan(PUBLISH) == Publish(), "what came before may end as it began"
    await asyncio.sleep(0)
    assert roles.next == "decode", "others have yet to read what it has prefilled"
    owed.set()
    await switch
    assert (roles.now, roles.next, roles.stage, roles.started_as) == ("decode", None, "decode", "prefill")
    told = {name: metrics.registry.get_sample_value("triptych_role", {"role": name}) for name in ("prefill", "decode")}
    assert told == {"prefill": 0, "decode": 1}


async def test_a_switch_that_takes_too_long_is_undone() -> None:
    roles = Roles("decode", nothing_owed)
    with roles.serving():
        with pytest.raises(DeadlineExceeded, match=r"1 requests.*within 0.01 s .*this engine is decode still"):
            await roles.switch("prefill", 0.01)
        with roles.serving():
            assert (roles.now, roles.next, roles.in_flight) == ("decode", None, 2)


async def test_a_switch_that_nobody_waits_for_is_undone() -> None:
    roles = Roles("decode", nothing_owed)
    with roles.serving():
        switch = asyncio.create_task(roles.switch("prefill", 60))
        await until(lambda: roles.next == "prefill")
        switch.cancel()
        await asyncio.gather(switch, return_exceptions=True)
    assert repr(roles) == "<Roles decode, 0 in flight>"


async def test_only_who_may_not_have_heard_of_a_switch_is_sent_elsewhere() -> None:
    roles = Roles("decode", nothing_owed)
    with pytest.raises(BadRequest, match="role is decode"):
        roles.plan(PUBLISH)
    await roles.switch("decode", 60)
    with pytest.raises(BadRequest):
        roles.plan(PUBLISH)
    await roles.switch("prefill", 60)
    assert roles.plan(PUBLISH) == Publish()
    with pytest.raises(OtherRole, match="role is prefill") as caught:
        roles.plan({"do_remote_prefill": True, "metaserver": "http://p/v1/metaserver"})
    assert caught.value.stage == "decode", "that is who must be another"
    with pytest.raises(BadRequest, match="exclude each other"):
        roles.plan({"do_remote_decode": True, "do_remote_prefill": True})


@asynccontextmanager
async def serving(role: str) -> AsyncIterator[Engine]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        app = await stack.enter_async_context(build(settings(role=role, kv_lease=60.0)))
        yield Engine(session, await stack.enter_async_context(running(app, settings())), app)


async def test_an_engine_tells_its_role_everywhere_and_answers_exactly_in_each() -> None:
    async with serving("prefill") as one, serving("decode") as other:
        published = await one.ask(kv_transfer_params=PUBLISH)
        handoff = published.body["kv_transfer_params"]
        switch = asyncio.create_task(one.post("/role", {"role": "decode"}))

        await until(lambda: one.app.role == "prefill" and one.app.info()["turning_to"] == "decode")
        refused = await one.ask(kv_transfer_params=PUBLISH)
        assert (refused.status, refused.error["code"]) == (503, "other_role")  # type: ignore[index]
        read = await other.ask(kv_transfer_params=handoff)
        assert read.choices[0]["message"]["content"] == wanted()
        assert (await switch).body == {"role": "decode", "was": "prefill"}
        assert (await other.post("/role", {"role": "prefill"})).body == {"role": "prefill", "was": "decode"}
        info, health = await one.get("/info"), await one.get("/health")
        assert (info["role"], info["started_as"], info["turning_to"]) == ("decode", "prefill", None)
        assert health == {"role": "decode"}
        assert 'triptych_role{role="decode"} 1.0' in await one.text("/metrics")
        handoff = (await other.ask(kv_transfer_params=PUBLISH)).body["kv_transfer_params"]
        assert (await one.ask(kv_transfer_params=handoff)).choices[0]["message"]["content"] == wanted()
        assert (await one.post("/role", {"role": "both"})).status == 200
        whole = await one.ask(messages=MESSAGES)
        assert whole.choices[0]["message"]["content"] == wanted()
        refused = await other.ask()
        assert (refused.status, refused.error["code"]) == (503, "other_role")  # type: ignore[index]
        await one.idle()
