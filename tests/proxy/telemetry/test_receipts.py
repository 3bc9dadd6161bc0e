"""What can be asked of requests that have ended: each path's legs, what went wrong, over one worker and several."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from proxy.core import Stage
from proxy.record import Choice, Record
from proxy.telemetry.receipts import Receipts
from proxy.workers.siblings import Kind, Siblings
from tests.fakes.deployment import Deployment, deployment
from tests.fakes.faults import Fault
from tests.fakes.faults import Kind as Failing
from tests.fakes.media import chat, image, part
from tests.fakes.native import Language
from tests.support.crowd import crowd
from tests.support.waiting import eventually


async def receipt(d: Deployment, name: str = "r1") -> dict[str, Any]:
    answer = await d.get(f"/requests/{name}")
    assert answer.status == 200, answer.body
    return dict(answer.json)


def legs(told: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(leg["stage"], leg["instance"], leg["attempt"], leg["items"], leg["outcome"]) for leg in told["legs"]]


async def test_a_receipt_tells_each_leg_of_the_path_it_took() -> None:
    async with deployment("1e1p1d") as d:
        await d.post(chat(part(image()), stream=True), x_request_id="r1")
        told = await receipt(d)
    e, p, dec = d.encoders[0].netloc, d.prefills[0].netloc, d.decodes[0].netloc
    assert legs(told) == [("encode", e, 1, 1, "ok"), ("decode", dec, 1, 0, "ok"), ("prefill", p, 1, 0, "ok")]
    assert (told["status"], told["path"], told["attempts"], told["items"], told["stream"]) == (200, "E-P-D", 1, 1, True)
    assert told["route"].endswith(f"reason={told['reason']}") and told["error"] is told["code"] is None
    assert 0 <= told["admitted"] <= told["drawn"] <= told["ttft"] <= told["seconds"]
    for leg in told["legs"]:
        assert told["drawn"] <= leg["began"] <= (leg["first"] or leg["ended"]) <= leg["ended"] <= told["seconds"]
    assert told["received"] > 100 and told["sent"] > 100 and told["output_tokens"] > 0
    assert set(told["timings"]) == {"encode", "prefill", "ttft", "decode"}


async def test_a_failed_leg_and_the_one_that_took_its_place_are_both_told() -> None:
    async with deployment("2b") as d:
        bad, good = d.combined
        bad.always = Fault(Failing.RESET)
        for name in ("r1", "r2"):  # if the first does not meet it, the second does
            assert (await d.post(chat(), x_request_id=name)).status == 200
        told, *_ = [one for name in ("r2", "r1") if (one := await receipt(d, name))["attempts"] == 2]
    assert legs(told) == [("decode", bad.netloc, 1, 0, "broken"), ("decode", good.netloc, 2, 0, "ok")]
    (event,) = told["events"]
    assert event["name"] == "retry" and event["detail"].startswith(f"decode: broken, goes on at PD; both={good.netloc}")
    assert told["legs"][0]["ended"] <= event["at"] <= told["legs"][1]["began"]


async def test_what_happened_on_the_way_is_told_with_its_time() -> None:
    async with deployment("1e2b", inline_encoding=True) as d:
        d.encoders[0].always = Fault(Failing.STATUS, status=500)
        assert (await d.post(chat(part(image())), x_request_id="r1")).status == 200
        told = await receipt(d)
    assert [(event["name"], event["detail"]) for event in told["events"]] == [
        ("fallback", "encode: server_error, encoded inline")
    ]
    assert 0 < told["events"][0]["at"] < told["seconds"]


async def test_candidates_are_told_with_what_was_known_of_them_then() -> None:
    async with deployment("2e2p2d") as d:
        await d.post(chat(part(image())), x_request_id="r1")
        told = await receipt(d)
        for leg in told["legs"]:
            (choice,) = leg["choices"]
            scores = [one["score"] for one in choice["candidates"]]
            assert scores == sorted(scores) and choice["of"] == 2 and not choice["joined"]
            assert [one["instance"] for one in choice["candidates"] if one["chosen"]] == [leg["instance"]]
        units = {leg["stage"]: leg["choices"][0]["unit"] for leg in told["legs"]}
        assert units == {"encode": "seconds", "prefill": "tokens", "decode": "tokens"}, "as their policies go by"
        assert "choices" not in (await d.get("/requests")).json["requests"][0]["legs"][0]


async def test_of_many_candidates_the_best_are_told_and_the_chosen_one() -> None:
    urls = [f"http://{number}" for number in range(100)]
    record = Record("r1", began=1.0, ended=2.0)
    record.leg(Stage.DECODE, urls[50], 0, 1.0, (Choice(urls, range(100), "tokens"), Choice((), (), "", joined=True)))
    receipts = Receipts(1)
    receipts.ended(record)
    told = orjson.loads((await receipts.one(Asked("/requests/r1"))).body)
    many, joined = told["legs"][0]["choices"]
    assert [one["instance"] for one in many["candidates"]] == [*map(str, range(16)), "50"] and many["of"] == 100
    assert joined == {"joined": True, "unit": "", "of": 0, "candidates": []}


async def test_requests_that_never_reached_an_engine_have_one_too() -> None:
    async with deployment("1b") as d:
        await d.post(b"{", x_request_id="r1")
        told = await receipt(d)
    assert (told["status"], told["code"], told["legs"], told["path"]) == (400, "invalid_request", [], "none")
    assert told["error"].startswith("proxy: the body is not JSON")


async def test_a_client_that_left_is_told_as_such() -> None:
    async with deployment("1b") as d:
        d.combined[0].always = Fault(Failing.HANG)
        async with aiohttp.ClientSession() as http:
            headers = {"x-request-id": "r1"}
            asking = asyncio.create_task(http.post(f"{d.url}/v1/chat/completions", json=chat(), headers=headers))
            await d.combined[0].until(lambda: d.combined[0].running == 1)
            assert (await d.get("/requests/r1")).status == 404, "it has not ended"
            asking.cancel()
            await asyncio.wait([asking])
            await d.settle()
        told = await receipt(d)
    assert (told["status"], told["ttft"]) == (499, None)
    assert legs(told) == [("decode", d.combined[0].netloc, 1, 0, "cancelled")]


async def test_the_latest_come_first_and_the_oldest_are_forgotten() -> None:
    async with deployment("1b", receipts=3) as d:
        for number in range(5):
            await d.post(chat(), x_request_id=f"r{number}")
        assert [one["id"] for one in (await d.get("/requests")).json["requests"]] == ["r4", "r3", "r2"]
        assert [one["id"] for one in (await d.get("/requests?limit=1")).json["requests"]] == ["r4"]
        assert (await d.get("/requests/r0")).error["code"] == "not_found"
        for limit in ("0", "-1", "x", "1001", "9" * 30):
            assert (await d.get(f"/requests?limit={limit}")).error["param"] == "limit"


async def test_without_receipts_there_are_none() -> None:
    async with deployment("1b", receipts=0) as d:
        await d.post(chat(), x_request_id="r1")
        assert (await d.get("/requests")).json == {"requests": []}


async def test_nothing_that_was_said_is_kept() -> None:
    async with deployment("1e1b") as d:
        body = chat(part(image())) | {"user": "4711-secret"}
        body["messages"][0]["content"].append({"type": "text", "text": "the prompt's secret"})
        await d.post(body, authorization="Bearer secret", x_request_id="r1")
        shown = (await d.get("/requests/r1")).body + (await d.get("/requests")).body
    assert b"secret" not in shown and b"base64" not in shown


async def test_whichever_worker_is_asked_tells_of_all(tmp_path: Path) -> None:
    siblings = [Siblings(tmp_path, 3, worker) for worker in range(3)]
    crew = [Receipts(10, one) for one in siblings]
    for number, receipts in zip(range(6), itertools.cycle(crew), strict=False):
        receipts.ended(Record(f"r{number}", began=1.0 + number, ended=20.0 + number))
    async with siblings[1].listening({Kind.RECEIPTS: crew[1].answer}):  # 2 is dead
        recent = orjson.loads((await crew[0].recent(Asked("/requests", {"limit": "3"}))).body)
        assert [one["id"] for one in recent["requests"]] == ["r4", "r3", "r1"]
        one = orjson.loads((await crew[0].one(Asked("/requests/r4"))).body)
        assert (one["id"], one["seconds"]) == ("r4", 19.0)


class Asked:
    """As much of a request as handlers look at."""

    def __init__(self, path: str, query: Mapping[str, str] = {}) -> None:
        self.path = path
        self.query = query


async def test_several_workers_are_one_to_whoever_asks(tmp_path: Path) -> None:
    async with Language() as engine, crowd(tmp_path, 3, "--decode-servers-urls", engine.url) as proxy:
        assert [await proxy.chat(chat()) for _ in range(12)] == [200] * 12

        async def all_are_told() -> bool:  # by whichever worker: a request ends a moment after its answer has gone out
            told = [(await proxy.get("/requests"))["requests"] for _ in range(6)]
            return all(len(requests) == 12 for requests in told) and all(requests == told[0] for requests in told)

        await eventually(all_are_told)
        requests = (await proxy.get("/requests"))["requests"]
        ends = [one["at"] + one["seconds"] for one in requests]
        assert ends == sorted(ends, reverse=True)
        for one in requests:
            told = await proxy.get(f"/requests/{one['id']}")
            assert (told["id"], told["path"], told["status"]) == (one["id"], "PD", 200)
        found = await proxy.metrics()
        assert found["triptych_queue_seconds_count",] == found["triptych_attempts_count",] == 12
        assert found["triptych_build_info", version("triptych")] == 1
        assert found["triptych_circuit_state", engine.netloc, "both"] == 0


async def test_a_circuit_that_any_worker_opened_is_told_by_all(tmp_path: Path) -> None:
    flags = ("--breaker-failures", "1", "--breaker-delay", "60")
    async with Language() as engine, crowd(tmp_path, 2, "--decode-servers-urls", engine.url, *flags) as proxy:
        engine.fail(Fault(Failing.STATUS, status=500))
        assert await proxy.chat(chat()) == 500
        states = [(await proxy.metrics())["triptych_circuit_state", engine.netloc, "both"] for _ in range(8)]
        assert states == [2] * 8
