"""The table of a plan, and every way not to get one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deploy import plan
from tests.fakes.deployment import deployment
from tests.fakes.media import chat, image, part
from tests.support.answering import answering


def role(name: str, **numbers: Any) -> dict[str, Any]:
    usual = {"engines": 2, "utilisation": 0.5, "limit": 0.9, "carries": 18.0, "headroom": 8.0, "one_more": 0.0}
    return {"role": name, "advised": 2, **usual, **numbers}


PLAN = {
    "offered": {"requests": 10.0},
    "carries": 6.912,
    "would_carry": 12.5,
    "bottleneck": "encode",
    "ratio": "3:2:2",
    "roles": [
        role("encode", utilisation=0.83, limit=0.6, carries=6.912, headroom=-3.088, one_more=3.456, advised=3),
        role("prefill"),
        role("decode", carries=None, headroom=None),
    ],
}


@contextmanager
def proxy(status: int, body: bytes) -> Iterator[str]:
    with answering(status, body) as (url, asked):
        yield url
    assert asked and all(path.startswith("/plan") for path in asked)


def test_a_table_marks_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    with proxy(200, json.dumps(PLAN).encode()) as url:
        assert plan.main(["--url", url + "/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{url}/ is asked 10 requests/s and carries 6.91"
    assert lines[2:6] == [
        "role     engines  busy  limit  carries  headroom  one more  advised",
        "encode         2   83%    60%     6.91     -3.09     +3.46        3  <- bottleneck",
        "prefill        2   50%    90%       18        +8        +0        2",
        "decode         2   50%    90%      any       any        +0        2",
    ]
    assert lines[7] == "advised 3:2:2 carries 12.5"


def test_a_table_ends_with_the_engine_that_should_turn(capsys: pytest.CaptureFixture[str]) -> None:
    switch = {"url": "http://d1:8003", "from": "decode", "to": "prefill", "would_carry": 9.5}
    with proxy(200, json.dumps({**PLAN, "switch": switch}).encode()) as url:
        assert plan.main(["--url", url]) == 0
    assert capsys.readouterr().out.splitlines()[8:] == [
        "with http://d1:8003 turned from decode to prefill it carries 9.5"
    ]


def test_json_is_the_proxys_own(capsys: pytest.CaptureFixture[str]) -> None:
    with proxy(200, json.dumps(PLAN).encode()) as url:
        assert plan.main(["--url", url, "--engines", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PLAN


async def test_a_real_proxys_plan_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    async with deployment("1e1p1d") as d:
        await d.post(chat(part(image()), stream=True))
        await d.settle()
        assert await asyncio.to_thread(plan.main, ["--url", d.url, "--engines", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["encode", "prefill", "decode"]
    assert sum(int(line.removesuffix("  <- bottleneck").split()[-1]) for line in lines[3:6]) == 6
    assert sum(line.endswith("<- bottleneck") for line in lines) == 1


NOTHING = {"offered": {"requests": 0.0}, "reason": "nothing is offered"}
BROKEN = {"offered": {"requests": 1.0}, "reason": "no role of the fleet can answer"}
REFUSED = {"error": {"message": "engines must be a number"}}


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, json.dumps(NOTHING), "no request has ended there in the last minutes"),
        (200, json.dumps(BROKEN), "no role of the fleet can answer"),
        (400, json.dumps(REFUSED), "answered 400: engines must be a number"),
    ],
)
def test_without_a_plan_it_says_why(status: int, body: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with proxy(status, body.encode()) as url:
        assert plan.main(["--url", url]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("triptych plan: ") and why in told.err
