"""An instance's way to another role: by a real proxy, at scripted engines that turn when they are told to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.core import BOTH, Instance, Role, State, Switch
from proxy.joining.membership import CONFIGURED
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat
from tests.fakes.native import ENGINES, Turning
from tests.support.crowd import crowd
from tests.support.waiting import eventually, until

TURNING = {**ENGINES, "p": lambda: Turning("prefill"), "d": lambda: Turning("decode"), "b": lambda: Turning("both")}


@asynccontextmanager
async def turning(topology: str, **settings: Any) -> AsyncIterator[Deployment]:
    async with deployment(topology, make=TURNING, **({"probe_interval": 0.05} | settings)) as d:
        yield d


def of(d: Deployment, engine: Any) -> Instance:
    instance = d.proxy.fleet.get(engine.url)
    assert instance is not None
    return instance


async def switch(d: Deployment, engine: Any, role: str, **more: Any) -> Answer:
    return await d.post({"url": engine.url, "role": role, **more}, "/instances/role")


async def rejoined(d: Deployment, engine: Any, role: Role) -> None:
    await until(lambda: of(d, engine).state is State.READY and of(d, engine).role == role)


@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_it_ends_what_it_has_and_serves_as_what_it_has_become(handoff: str) -> None:
    async with turning("1p2d", handoff=handoff) as d:
        one, other = d.decodes
        one.gate = other.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await one.until(lambda: one.running == 1)
        switched = asyncio.create_task(switch(d, one, "prefill"))
        await until(lambda: of(d, one).state is State.DRAINING)
        shown = {i["url"]: i for i in (await d.get("/instances")).json["instances"]}[one.url]
        assert (shown["role"], shown["turning_to"], shown["leases"]) == ("decode", "prefill", 1)
        await d.proxy.health.tick()
        assert of(d, one).reason == "drained, to be prefill", "that it is healthy is no reason to drain"
        assert not one.asked, "the engine is asked when it is idle"
        one.gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]
        answer = (await switched).json
        assert (answer["role"], answer["was"], answer["instance"]["role"]) == ("prefill", "decode", "prefill")
        await rejoined(d, one, Role.PREFILL)
        (asked,) = one.asked
        assert asked["role"] == "prefill" and 0 < asked["timeout"] <= 120
        calls = len(one.calls)
        answers = await asyncio.gather(*(d.post(chat()) for _ in range(6)))
        assert {answer.status for answer in answers} == {200}
        prefills = [c for c in one.calls[calls:] if c.body["kv_transfer_params"].get("do_remote_decode")]
        assert prefills and len(prefills) == len(one.calls) - calls
        assert len(other.calls) == 1 + 6
        back = await switch(d, one, "decode")
        assert back.json["instance"]["listed_as"] == "decode"
        await rejoined(d, one, Role.DECODE)


async def test_it_stays_as_it_was_where_requests_take_too_long() -> None:
    async with turning("1p2d") as d:
        one, other = d.decodes
        one.gate = other.gate = asyncio.Event()
        asking = [asyncio.create_task(d.post(chat())) for _ in range(2)]
        await one.until(lambda: one.running == 1)
        late = await switch(d, one, "prefill", timeout=0.05)
        assert (late.status, late.error["code"]) == (504, "switch_timeout")
        assert "1 requests" in late.error["message"] and not one.asked
        await rejoined(d, one, Role.DECODE)
        one.gate.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]


async def test_it_stays_as_it_was_where_the_engine_refuses() -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        one.refusal = Fault(Kind.STATUS, status=504)
        refused = await switch(d, one, "prefill")
        assert refused.status == 504
        await rejoined(d, one, Role.DECODE)
        assert of(d, one).switch is None and of(d, one).listed_as is None
        assert (await d.post(chat())).status == 200


async def test_it_stays_as_it_was_where_whoever_asked_hangs_up() -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        one.turning = asyncio.Event()
        asking = asyncio.create_task(switch(d, one, "prefill"))
        await one.until(lambda: bool(one.asked))
        asking.cancel()
        await until(lambda: one.hung_up == 1)
        await rejoined(d, one, Role.DECODE)


async def test_an_engine_that_dies_on_the_way_is_what_it_is_when_it_is_back() -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        one.turning = asyncio.Event()
        asking = asyncio.create_task(switch(d, one, "prefill"))
        await one.until(lambda: bool(one.asked))
        await one.stop()
        dead = await asking
        assert (dead.status, dead.error["type"]) == (502, "engine_error")
        assert (await d.post(chat())).status == 200, "the others serve on"
        await until(lambda: "refused" in of(d, one).reason)
        assert of(d, one).state is State.JOINING
        one.role = "prefill"  # it had done it, and its answer was lost
        await one.start()
        await rejoined(d, one, Role.PREFILL)
        await one.stop()
        await until(lambda: of(d, one).state is State.DOWN)
        one.role = "decode"  # started again as the first time
        await one.start()
        await rejoined(d, one, Role.DECODE)


async def test_an_engine_that_was_turned_by_somebody_else_is_found_out() -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        one.role = "prefill"
        await rejoined(d, one, Role.PREFILL)
        assert of(d, one).listed is Role.DECODE
        d.proxy.membership.configure(d.proxy.settings.fleet())
        assert of(d, one).state is State.READY, "the list has not changed"
        one.role = one.started_as = "both"
        await until(lambda: "started with the role 'both', but listed as 'decode'" in of(d, one).reason)
        one.role = one.started_as = "decode"
        await rejoined(d, one, Role.DECODE)


async def test_one_that_had_turned_before_it_was_heard_of_may_turn_back() -> None:
    async with turning("1p1d") as d, Turning("prefill") as one:

        async def beat() -> None:
            said = {"role": one.role, "url": one.url, "ttl": 60, "life": "first"}
            assert (await d.post(said, "/instances")).status == 200

        one.role = "decode"  # by another proxy; this one has just begun
        await beat()
        await rejoined(d, one, Role.DECODE)
        one.role = "prefill"
        await beat()
        await rejoined(d, one, Role.PREFILL)


@pytest.mark.parametrize("handoff", ["push", "pull"])
async def test_what_an_engine_refuses_as_it_turns_is_served_by_another(handoff: str) -> None:
    async with turning("1p2d", probe_interval=30.0, handoff=handoff) as d:
        one, other = d.decodes
        one.always = Fault(Kind.STATUS, status=503, error={"message": "no", "code": "other_role"})
        answers = [await d.post(chat()) for _ in range(8)]
        assert {answer.status for answer in answers} == {200}
        assert one.calls and len(other.calls) == 8
        assert len(d.prefills[0].calls) == 8, "what prefill keeps is read by whoever does not refuse"
        assert d.proxy.health.circuit(of(d, one)) == "CLOSED"


async def test_an_engine_that_turns_is_left_alone_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.retry.TURNED_S", 60.0)
    async with turning("1p1d", probe_interval=30.0, handoff="pull") as d:
        one = d.decodes[0]
        one.always = Fault(Kind.STATUS, status=503, error={"message": "no", "code": "other_role"})
        refused, *others = [await d.post(chat()) for _ in range(4)]
        assert refused.error["code"] == "other_role"
        assert {answer.status for answer in others} == {503} and len(one.calls) == 1
        assert len(d.prefills[0].calls) == 1, "nothing is prefilled that nobody would read"


@pytest.mark.parametrize(
    ("topology", "letter", "role", "told"),
    [
        ("1p1d", "prefills", "decode", "is the last prefill engine"),
        ("1e1b", "combined", "prefill", "is the last both engine"),
        ("2e1b", "encoders", "decode", "only prefill, decode and both"),
        ("1p2d", "decodes", "encode", "only prefill, decode and both"),
    ],
)
async def test_what_cannot_be_is_refused(topology: str, letter: str, role: str, told: str) -> None:
    async with turning(topology) as d:
        refused = await switch(d, getattr(d, letter)[0], role)
        assert (refused.status, refused.error["code"]) == (409, "conflict")
        assert told in refused.error["message"]


async def test_mistakes_are_told() -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        assert (await switch(d, one, "chef")).error["param"] == "role"
        assert (await switch(d, one, "prefill", timeout=-1)).error["param"] == "timeout"
        assert (await d.post({"url": "http://h:1", "role": "both"}, "/instances/role")).status == 404
        assert (await switch(d, one, "decode")).json["was"] == "decode", "it is that already"
        of(d, one).dialect = "vllm"
        assert "engines of our own" in (await switch(d, one, "prefill")).error["message"]
        of(d, one).dialect = "native"
        one.turning = asyncio.Event()
        asking = asyncio.create_task(switch(d, one, "prefill"))
        await one.until(lambda: bool(one.asked))
        assert "already" in (await switch(d, one, "both")).error["message"]
        one.turning.set()
        assert (await asking).status == 200


async def test_the_last_two_of_a_role_do_not_turn_at_once() -> None:
    async with turning("1p2d") as d:
        answers = await asyncio.gather(*(switch(d, one, "prefill") for one in d.decodes))
        assert sorted(answer.status for answer in answers) == [200, 409]
        await until(lambda: all(i.state is State.READY for i in d.proxy.fleet))
        assert (await d.post(chat())).status == 200


async def test_the_last_of_a_role_turns_if_it_must() -> None:
    async with turning("1p1d") as d:
        assert (await switch(d, d.prefills[0], "both", force=True)).status == 200
        await rejoined(d, d.prefills[0], BOTH)
        assert (await d.post(chat())).status == 200


@pytest.mark.parametrize("how", ["drained", "removed", "unlisted", "registered"])
async def test_what_happens_to_it_on_the_way_comes_first(how: str) -> None:
    async with turning("1p2d") as d:
        one = d.decodes[0]
        one.turning = asyncio.Event()
        asking = asyncio.create_task(switch(d, one, "prefill"))
        await one.until(lambda: bool(one.asked))
        if how == "drained":
            await d.post({"url": one.url}, "/instances/drain")
        elif how == "removed":
            async with d.http.delete(d.url + "/instances", params={"url": one.url}) as response:
                assert response.status == 200
        elif how == "unlisted":
            listed = [entry for entry in d.proxy.settings.fleet() if entry[1].url != one.url]
            d.proxy.membership.configure(listed)
        else:
            await d.post({"role": "decode", "url": one.url}, "/instances")
        one.turning.set()
        answer = await asking
        if how == "registered":
            assert answer.status == 409
            await rejoined(d, one, Role.PREFILL)  # which the engine is by now
        else:
            assert answer.status == (200 if how == "unlisted" else 409)
            await until(lambda: d.proxy.fleet.get(one.url) is None)


async def test_a_switch_that_nobody_sees_to_any_more_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.health._OVERDUE_S", 0.0)
    async with turning("1p2d", probe_interval=30.0) as d:
        one = of(d, d.decodes[0])
        d.proxy.fleet.begin(one, Switch(Role.PREFILL, 0.0), "drained, to be prefill")
        assert one.sources == {CONFIGURED}
        await d.proxy.health.tick()
        assert (one.state, one.switch) == (State.JOINING, None)
        await d.proxy.health.tick()
        assert one.state is State.READY


async def test_all_workers_go_by_it(tmp_path: Path) -> None:
    one, other, third = Turning("prefill"), Turning("decode"), Turning("decode")
    async with one, other, third, crowd(tmp_path, 2, *lists(one, other, third)) as c:
        status, answer = await c.post("/instances/role", {"url": other.url, "role": "prefill"})
        assert (status, answer["role"]) == (200, "prefill")

        async def seen() -> bool:
            found = [(await c.instances())[other.url] for _ in range(8)]
            return all((i["role"], i["state"]) == ("prefill", "READY") for i in found)

        await eventually(seen)
        assert {await c.chat(chat()) for _ in range(12)} == {200}
        assert len(third.calls) == 12 and len(one.calls) + len(other.calls) == 12


async def test_a_worker_that_is_killed_on_the_way_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    one, other, third = Turning("prefill"), Turning("decode"), Turning("decode")
    other.turning = asyncio.Event()
    async with one, other, third, crowd(tmp_path, 2, *lists(one, other, third)) as c:
        asking = asyncio.create_task(c.post("/instances/role", {"url": other.url, "role": "prefill"}))
        await other.until(lambda: bool(other.asked))
        for pid in c.workers():
            os.kill(pid, signal.SIGKILL)
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: other.hung_up == 1)
        await c.states("READY")
        assert (await c.instances())[other.url]["role"] == "decode"
        assert await c.chat(chat()) == 200


def lists(prefill: Turning, *decodes: Turning) -> list[str]:
    urls = ",".join(one.url for one in decodes)
    return ["--prefill-servers-urls", prefill.url, "--decode-servers-urls", urls, "--switch-timeout", "1"]
