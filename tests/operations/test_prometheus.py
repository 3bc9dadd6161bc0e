"""Rules, alerts and board before a real Prometheus that scrapes real proxies: nothing shown there is always empty."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import native, vllm
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat, image, part
from tests.support.collector import collector
from tests.support.crowd import Crowd, crowd
from tests.support.prometheus import SHIPPED, Prometheus, prometheus
from tests.support.waiting import eventually

HERE = Path(__file__).parent
BOARD = json.loads((SHIPPED.parent / "grafana" / "triptych.json").read_text())
ALERTS = [rule for group in yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
RULES = [rule for group in yaml.safe_load((SHIPPED / "rules.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [(panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel.get("targets", ())]
VARIABLES = {'job=~"$job"': 'job=~".*"', 'instance=~"$proxy"': 'instance=~".*"', "$__rate_interval": "20s"}
SELECTOR = re.compile(r"\b(?:[a-z_]+:)?triptych_\w+(?::\w+)?(?:\{[^}]*\})?|\bup\{[^}]*\}")
BROKEN = Fault(Kind.STATUS, status=500)

pytestmark = pytest.mark.timeout(300)


def test_promtool_finds_nothing_wrong(part: Callable[[str], str]) -> None:
    promtool = part("promtool")
    subprocess.run([promtool, "check", "config", SHIPPED / "prometheus.yml"], check=True)
    subprocess.run([promtool, "test", "rules", HERE / "alerts.test.yml"], check=True)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [
        case
        for test in yaml.safe_load((HERE / "alerts.test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == silent == {rule["alert"] for rule in ALERTS}


@dataclass
class Site:
    """Two proxies, of our engines with two workers and of vLLM's, whose engines fail now and then."""

    ours: Crowd
    theirs: Crowd
    encoders: list[native.Encoder]
    prefills: list[native.Prefill]
    decodes: list[native.Decode]
    others: list[vllm.Encoder]

    async def round(self, number: int) -> None:
        """Requests of all kinds, and a failure of each kind among them."""
        new, known = image(8 + number % 64, 16), image(8, 8)
        bodies = [
            chat(),
            chat(stream=True),
            chat(part(known), part(known), part(new), stream=True, stream_options={"include_usage": True}),
            chat(part(new)),
        ]
        held = asyncio.Event()  # for longer than a scrape takes to come: load that Prometheus sees
        for engine in (*self.encoders, *self.prefills, *self.decodes):
            engine.gate = held
        asyncio.get_running_loop().call_later(1.2, held.set)
        await asyncio.gather(*(ask(self.ours, body) for body in bodies * 4))
        self.encoders[0].faults.append(BROKEN)
        self.prefills[0].faults.append(Fault(Kind.RESET))
        await asyncio.gather(*(ask(self.ours, body) for body in bodies))
        lost = deque([BROKEN] * 6)  # more than there are attempts
        for decode in self.decodes:
            decode.faults = lost
        await asyncio.gather(*(ask(self.ours, chat()) for _ in range(3)))
        lost.clear()
        for other in self.others:
            other.faults.append(BROKEN)
        await asyncio.gather(*(ask(self.theirs, body) for body in bodies))


async def ask(proxy: Crowd, body: dict[str, Any]) -> None:
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as answer:
        await answer.read()


@asynccontextmanager
async def site(folder: Path, otlp: str) -> AsyncIterator[Site]:
    world = vllm.World()
    encoders, prefills = [native.Encoder(), native.Encoder()], [native.Prefill(), native.Prefill()]
    decodes, others, combined = [native.Decode(), native.Decode()], [vllm.Encoder(world)], [vllm.Combined(world)]

    def lists(**of: list[Any]) -> list[str]:
        return [f for role, e in of.items() for f in (f"--{role}-servers-urls", ",".join(one.url for one in e))]

    encoders[0].cached, encoders[1].cached = True, False
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(native.started([*encoders, *prefills, *decodes, *others, *combined]))
        flags = ["--kv-handoff", "pull", "--max-concurrent", "8", "--max-queue", "2", "--breaker-failures", "1"]
        more = ["--breaker-delay", "0.2", "--hedge-after", "0.05", "--otlp-endpoint", otlp, "--trace-sample", "1"]
        first, second = folder / "first", folder / "second"
        first.mkdir()
        second.mkdir()
        yield Site(
            await stack.enter_async_context(
                crowd(first, 2, *lists(encode=encoders, prefill=prefills, decode=decodes), *flags, *more)
            ),
            await stack.enter_async_context(
                crowd(
                    second, 1, *lists(encode=others, decode=combined), "--inline-encoding", "--breaker-failures", "99"
                )
            ),
            *(encoders, prefills, decodes, others),
        )


def asked(query: str) -> str:
    """A query of the board with its variables replaced."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def selectors(expression: str) -> list[str]:
    """What a rule reads."""
    return SELECTOR.findall(expression)


async def test_a_real_prometheus_has_data_for_every_panel_rule_and_alert(
    part: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    async with collector() as sink, site(tmp_path, sink.url) as at:
        hosts = [one.url.removeprefix("http://") for one in (at.ours, at.theirs)]
        async with prometheus(part("prometheus"), folder, hosts) as prom:
            rounds = itertools.count()

            async def empty() -> dict[str, str]:
                await at.round(next(rounds))
                queries = {f"{title}: {query}": asked(query) for title, query in PANELS}
                queries |= {f"{rule['record']}": rule["record"] for rule in RULES}
                for rule in ALERTS:
                    queries |= {f"{rule['alert']}: {name}": name for name in selectors(rule["expr"])}
                return {name: query for name, query in queries.items() if not await prom.ask(query)}

            left: dict[str, str] = {}

            async def all_there() -> bool:
                nonlocal left
                left = await empty()
                return not left

            try:
                await eventually(all_there, 90)
            except TimeoutError:
                pytest.fail("no data for " + "\n".join(left))
            await ill(prom, at)
        assert len({told["service.instance.id"] for told in sink.resources}) == 2, "both workers send traces"


async def ill(prom: Prometheus, at: Site) -> None:
    """All rules are evaluated, and what breaks is told by its alert, which waits for its `for`."""
    groups = (await prom.get("rules"))["groups"]
    unwell = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    assert not unwell
    assert sum(len(group["rules"]) for group in groups) == len(RULES) + len(ALERTS)
    for prefill in at.prefills:
        await prefill.stop()

    async def told() -> set[str]:
        return {labels["alertname"] for labels, _ in await prom.ask('ALERTS{role="prefill"}')}

    async def down() -> bool:
        return await told() >= {"TriptychStageDown", "TriptychEngineDown"}

    await eventually(down, 30)
