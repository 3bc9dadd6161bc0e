"""Lines of the access log: when and who, in batches, and none lost at the end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re

from proxy.core import Stage
from proxy.record import Record
from proxy.telemetry.access import AccessLog


def served(name: str = "r") -> Record:
    record = Record(name, api="/v1/completions", began=10.0, first=10.25, ended=11.5, status=200, attempts=1)
    record.timings["ttft"] = 0.25
    record.path, record.route, record.reason = "PD", "PD; both=b:1; reason=text only", "text only"
    leg = record.leg(Stage.DECODE, "http://b:1", 0, 10.1)
    leg.ended, leg.outcome = 11.5, "ok"
    return record


async def test_lines_are_written_together_soon() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    log.ended(served("one"))
    log.ended(served("two"))
    assert stream.getvalue() == ""
    async with asyncio.timeout(10):
        while not stream.getvalue():
            await asyncio.sleep(0.01)
    stamp = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {os.getpid()} INFO proxy.access "
    lines = [re.fullmatch(stamp + "(.*)", line) for line in stream.getvalue().splitlines()]
    assert [line and line[1] for line in lines] == [
        f"{name} /v1/completions 200 e2e=1500ms ttft=250ms route='PD; both=b:1; reason=text only'"
        for name in ("one", "two")
    ]


async def test_a_failure_and_whose_it_was_stand_at_the_end() -> None:
    stream, record = io.StringIO(), served()
    record.caller, record.status, record.error = "alice", 502, "decode: broke off"
    log = AccessLog(stream)
    log.ended(record)
    log.flush()
    assert stream.getvalue().endswith("key=alice route='PD; both=b:1; reason=text only' error=decode: broke off\n")


async def test_programs_get_json_without_what_is_not_known() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, "json")
    log.ended(served())
    log.flush()
    line = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "id": "r",
        "api": "/v1/completions",
        "model": "",
        "status": 200,
        "seconds": 1.5,
        "path": "PD",
        "reason": "text only",
        "ttft": 0.25,
        "timings": {"ttft": 0.25},
        "attempts": 1,
        "instances": ["b:1"],
    }


async def test_many_lines_do_not_wait_and_the_last_ones_are_flushed() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    for number in range(300):
        log.ended(served(f"r{number}"))
    assert stream.getvalue().count("\n") == 256
    log.flush()
    log.flush()
    assert [line.split()[5] for line in stream.getvalue().splitlines()] == [f"r{n}" for n in range(300)]


def test_off_nothing_is_kept() -> None:
    stream = io.StringIO()
    log = AccessLog(stream, "off")
    log.ended(served())  # needs no loop
    log.flush()
    assert stream.getvalue() == ""
