"""GET /plan and its gauges, after real requests, over one worker and several."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.deployment import Deployment, deployment
from tests.fakes.media import chat, image, part
from tests.fakes.native import Language
from tests.support.crowd import crowd
from tests.support.waiting import eventually


async def gauges(d: Deployment, name: str) -> dict[str, float]:
    text = (await d.get("/metrics")).body.decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return {sample.labels["role"]: sample.value for sample in samples}


async def test_before_any_request_it_says_that_there_is_nothing_to_go_by() -> None:
    async with deployment("1e1p1d", admin_key="secret") as d:
        answer = await d.get("/plan")
        assert (answer.status, answer.json["reason"]) == (200, "nothing is offered")
        assert answer.json["offered"]["requests"] == 0
        assert await gauges(d, "triptych_advised_instances") == await gauges(d, "triptych_stage_utilisation") == {}


async def test_after_requests_it_advises() -> None:
    async with deployment("2e1p1d") as d:
        for number in range(4):
            await d.post(chat(part(image(64, 32 + number)), stream=True))
        await d.settle()
        answer = (await d.get("/plan")).json
        assert answer["offered"]["requests"] > 0 and answer["carries"] > 0
        assert answer["offered"]["encode_tokens"] > 0 and answer["one_engine_carries"]["encode_tokens"] > 0
        roles = {found["role"]: found for found in answer["roles"]}
        assert {role: found["engines"] for role, found in roles.items()} == {"encode": 2, "prefill": 1, "decode": 1}
        assert (
            answer["bottleneck"] == max(roles.values(), key=lambda found: found["utilisation"] / found["limit"])["role"]
        )
        assert answer["ratio"] == ":".join(str(found["advised"]) for found in answer["roles"])
        for found in roles.values():
            assert found["headroom"] == pytest.approx(found["carries"] - answer["offered"]["requests"])
        advised = await gauges(d, "triptych_advised_instances")
        assert advised == {role: found["advised"] for role, found in roles.items()}
        busy = await gauges(d, "triptych_stage_utilisation")
        later = busy["decode"] / roles["decode"]["utilisation"]  # all fall alike while nothing more is asked
        assert 0 < later <= 1
        assert busy == pytest.approx({role: later * found["utilisation"] for role, found in roles.items()})


async def test_it_splits_as_many_engines_as_one_asks_for() -> None:
    async with deployment("1e1b") as d:
        await d.post(chat(part(image()), stream=True))
        await d.settle()
        answer = (await d.get("/plan?engines=7")).json
        assert sum(found["advised"] for found in answer["roles"]) == 7
        assert answer["would_carry"] > answer["carries"]
        assert "cannot have all the roles" in (await d.get("/plan?engines=1")).json["reason"]
        for wrong in ("0", "-1", "many", "99999999999"):
            refused = await d.get(f"/plan?engines={wrong}")
            assert (refused.status, refused.error["param"]) == (400, "engines"), wrong


async def test_any_worker_tells_of_all(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 3, "--decode-servers-urls", engine.url) as proxy:
        for _ in range(24):
            assert await proxy.chat(chat(stream=False)) == 200

        async def told() -> bool:
            plans = [await proxy.get("/plan") for _ in range(9)]
            requests = [plan["offered"]["requests"] for plan in plans]
            # Each call a little later than the one before: a rate falls while nothing more is asked.
            return (
                min(requests) > 0
                and all(plan["roles"][0]["role"] == "both" for plan in plans)
                and (max(requests) / min(requests) < 2)
            )

        await eventually(told)
