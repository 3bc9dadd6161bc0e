"""The operator's page says what is so: what it names exists, and what it tells of failures is what happens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engines.settings import EncoderSettings, LanguageSettings
from proxy.reloading import LIVE
from proxy.settings import ProxySettings
from tests.fakes.deployment import Answer, Deployment, deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy/OPERATING.md").read_text()


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of its first table."""
    rows = re.findall(r"^\| (.*) \|$", section(heading), re.MULTILINE)
    return [re.split(r" ?\| ?", row) for row in rows if not row.startswith(("---", "--"))][1:]


FAILURES = {row[0]: row for row in table("Failure table")}


# ---- what is named is there


def test_headings_are_listed_and_links_lead_somewhere() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target.removeprefix("#") in anchors, target
        elif "://" not in target:
            assert (ROOT / "deploy" / target.partition("#")[0]).exists(), target
    listed = re.findall(r"^\[([^\]]+)\]\(#", PAGE, re.MULTILINE)
    assert listed == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


def test_every_flag_that_is_named_exists() -> None:
    fields = {
        field.alias or name
        for settings in (ProxySettings, EncoderSettings, LanguageSettings)
        for name, field in settings.model_fields.items()
    }
    known = {name.replace("_", "-") for name in fields} | FLAGS_OF_OTHERS
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", PAGE))
    assert named - known == set()


FLAGS_OF_OTHERS = {
    *("help", "engines", "scenario"),  # triptych plan; python -m bench.simulate
    *("url", "once"),  # triptych top
    "json",  # triptych check
    *("bytes", "join"),  # triptych store
    *("models", "requests-per-minute", "concurrent"),  # triptych key
    *("no-deps", "detach", "build", "kustomize"),  # docker compose, kubectl
    *("cpunodebind", "membind"),  # numactl
}


def test_what_tuning_calls_live_is_live() -> None:
    live = {name.replace("_", "-") for name in LIVE}
    for _, turn, _ in table("Tuning"):
        for flag, mark in re.findall(r"`--([a-z-]+)[^`]*`( \*)?", turn):
            assert (flag in live) is not bool(mark), flag


def test_every_metric_and_alert_that_is_named_exists() -> None:
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    known = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
    assert set(re.findall(r"`(Triptych[A-Z]\w+)`", PAGE)) <= known


# ---- what is told of failures happens

Scenario = Callable[[Deployment], Awaitable[Answer]]

SCENARIOS: dict[str, tuple[str, dict[str, Any], Scenario]] = {}
"""By the failure's name: a topology, settings, and what breaks there; its answer is the client's."""


def scenario(failure: str, topology: str, **settings: Any) -> Callable[[Scenario], Scenario]:
    def kept(made: Scenario) -> Scenario:
        SCENARIOS[failure] = topology, settings, made
        return made

    return kept


def picture(number: int = 0) -> dict[str, Any]:
    return part(image(8 + number, 8))


async def until_counted(d: Deployment, metric: str, ask: Callable[[int], Awaitable[Answer]]) -> Answer:
    """Ask until somebody was asked twice; who is asked first is not to be foreseen."""
    for number in range(20):
        answer = await ask(number)
        assert answer.status == 200
        if await counted(d, metric):
            return answer
    raise AssertionError(f"no {metric} after 20 requests")


@scenario("one encoder dies or cannot be reached", "2e1b")
async def _(d: Deployment) -> Answer:
    await d.encoders[0].stop()
    return await until_counted(d, 'triptych_retries_total{stage="encode"}', lambda n: d.post(chat(picture(n))))


@scenario("all encoders are gone", "1e1b")
async def _(d: Deployment) -> Answer:
    await d.encoders[0].stop()
    await d.post(chat(picture()))
    assert (await d.post(chat())).status == 200
    return await d.post(chat(picture()))


@scenario("the same with `--inline-encoding`", "1e1b", inline_encoding=True)
async def _(d: Deployment) -> Answer:
    await d.encoders[0].stop()
    return await d.post(chat(picture()))


@scenario("a prefill engine dies", "2p1d")
async def _(d: Deployment) -> Answer:
    await d.prefills[0].stop()
    return await until_counted(d, 'triptych_retries_total{stage="prefill"}', lambda _: d.post(chat()))


@scenario("a decode engine dies before its first token", "1p2d", handoff="pull")
async def _(d: Deployment) -> Answer:
    await d.decodes[0].stop()
    return await until_counted(d, 'triptych_retries_total{stage="decode"}', lambda _: d.post(chat()))


@scenario("a decode engine dies in the middle of a stream", "1b")
async def _(d: Deployment) -> Answer:
    d.combined[0].fail(Fault(Kind.TRUNCATED, after=2))
    return await d.post(chat(stream=True))


@scenario("the same with `--resume`", "2b", resume=True)
async def _(d: Deployment) -> Answer:
    d.combined[0].fail(Fault(Kind.TRUNCATED, after=2))
    return await until_counted(d, "triptych_resumes_total", lambda _: d.post(chat(stream=True, temperature=0)))


@scenario("the last engine of a role dies", "1b")
async def _(d: Deployment) -> Answer:
    await d.combined[0].stop()
    first = await d.post(chat())
    assert f"{first.status} `{first.error['code']}`" in FAILURES["the last engine of a role dies"][1]
    return await d.post(chat())


@scenario("an engine hangs, and takes requests", "1b", answer_timeout=0.1)
async def _(d: Deployment) -> Answer:
    d.combined[0].always = Fault(Kind.HANG)
    return await d.post(chat())


@scenario("an engine answers 5xx", "1b", breaker_failures=1)
async def _(d: Deployment) -> Answer:
    d.combined[0].fail(Fault(Kind.STATUS, status=500, error="its own message"))
    answer = await d.post(chat())
    assert (answer.status, answer.error["message"]) == (500, "its own message")
    return answer


@scenario("an engine is full (429, or 503 with `retry-after`)", "1b")
async def _(d: Deployment) -> Answer:
    d.combined[0].fail(Fault(Kind.STATUS, status=429, retry_after="7"))
    answer = await d.post(chat())
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    return answer


@scenario("an embedding or KV is gone before it is read", "1p1d", handoff="pull")
async def _(d: Deployment) -> Answer:
    d.decodes[0].fail(Fault(Kind.STATUS, status=503, error={"message": "gone", "code": "kv_gone"}))
    return await d.post(chat())


@scenario("more is asked than the fleet carries", "1b", max_concurrent=1, max_queue=0)
async def _(d: Deployment) -> Answer:
    d.combined[0].gate = asyncio.Event()
    running = asyncio.create_task(d.post(chat()))
    await d.combined[0].until(lambda: d.combined[0].running == 1)
    answer = await d.post(chat())
    d.combined[0].gate.set()
    assert (await running).status == 200
    return answer


@scenario("a media URL that may not be asked for", "1e1b")
async def _(d: Deployment) -> Answer:
    metadata = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    answer = await d.post(chat(metadata))
    assert answer.error["param"] == "messages[0].content[1]"
    return answer


@scenario("a media URL that does not answer", "1e1b", media_urls="fetch", media_networks="127.0.0.0/8")
async def _(d: Deployment) -> Answer:
    return await d.post(chat({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/picture.png"}}))


@scenario("a wrong API key", "1b", api_keys=ROOT / "deploy/examples/keys.yaml")
async def _(d: Deployment) -> Answer:
    return await d.post(chat(), authorization="Bearer triptych-wrong")


@scenario("a client goes away", "1b")
async def _(d: Deployment) -> Answer:
    d.combined[0].gate = asyncio.Event()
    leaving = asyncio.create_task(d.post(chat()))
    await d.combined[0].until(lambda: d.combined[0].running == 1)
    leaving.cancel()
    await d.combined[0].until(lambda: d.combined[0].aborted == 1)
    d.combined[0].gate = None
    return await d.post(chat())


ELSEWHERE = {
    "an engine is slow": "tests/bench/simulator/scenarios/test_policies.py",
    "many wrong keys from one address": "tests/proxy/auth/test_guard.py",
    "a key over its limits": "tests/proxy/auth/test_quota.py",
    "a worker of the proxy dies": "tests/proxy/workers/test_supervisor.py",
    "a proxy dies": "tests/operations/test_fronts.py",
    "the proxy has too little CPU": "tests/proxy/telemetry/test_lag.py",
    "a proxy is stopped": "tests/operations/test_fronts.py",
    "decode engines cannot reach the proxy (`kv_handoff: push`)": "tests/proxy/test_callbacks.py",
    "DNS or the API server cannot be read": "tests/proxy/discovery",
    "a changed configuration is wrong": "tests/proxy/test_reloading.py",
    "the trace collector is gone": "tests/proxy/telemetry/test_tracing.py",
    "Prometheus is gone": "deploy/prometheus/alerts.yml",
}
"""Failures that other tests bring about."""


def test_every_failure_of_the_table_is_brought_about_somewhere() -> None:
    assert list(FAILURES) == [row[0] for row in table("Failure table")]
    assert FAILURES.keys() == SCENARIOS.keys() | ELSEWHERE.keys()
    assert not SCENARIOS.keys() & ELSEWHERE.keys()
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())


@pytest.mark.parametrize("failure", SCENARIOS)
async def test_a_failure_looks_as_the_table_says(failure: str) -> None:
    topology, settings, broken = SCENARIOS[failure]
    _, seen, _, metrics, _ = FAILURES[failure]
    async with deployment(topology, **settings) as d:
        answer = await broken(d)
        await d.settle()
        code = _code(answer)
        if code is None:
            assert seen == "" or "nothing" in seen
        elif f"`{code}`" in seen:
            assert answer.status == 200 or f"{answer.status} `{code}`" in seen
        else:
            assert "its own status" in seen or "its status" in seen
        for metric in re.findall(r"`(triptych_[^`]+)`", metrics):
            assert await counted(d, metric), metric


def _code(answer: Answer) -> str | None:
    """Of the error that the client saw, as an answer or as a stream's last event."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.body.split(b"\n\n")[:-1]
        if events[-1] == b"data: [DONE]":
            return None
        answer = Answer(200, answer.headers, events[-1].removeprefix(b"data: "))
    return str(answer.error["code"]) if "error" in answer.json else None


async def counted(d: Deployment, metric: str) -> bool:
    """Whether a sample of a metric, written as `name{label="value"}`, is more than 0."""
    name, _, labels = metric.partition("{")
    wanted = re.findall(r'\w+="[^"]*"', labels)
    lines = (await d.get("/metrics")).body.decode().splitlines()
    return any(
        re.match(rf"{name}(_count)?[{{ ]", line)
        and all(label in line for label in wanted)
        and float(line.rpartition(" ")[2]) > 0
        for line in lines
    )
