"""Engines that turn from prefill to decode and back while clients ask: every answer exact, none refused, none lost.

Two proxies stand before them, one that pushes and one that pulls. The first is told to turn an engine; the other finds
out by itself.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import pytest_asyncio

from deploy.processes import Child
from tests.support.cluster import Answer, Client, Cluster, cluster
from tests.support.waiting import eventually, until
from tests.system.cases import CASES
from tests.system.topologies import ready

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen2_5_vl"
CLIENTS = 2  # at each proxy
ROUTES = 6  # answers that have to be seen of a new role, before the next


@dataclass
class Fleet:
    engines: Cluster
    proxies: Sequence[Client]

    @property
    def engine(self) -> Child:
        """Of two that prefill at first."""
        return self.engines.deployment.role("prefill")[1]

    async def turn(self, role: str) -> Answer:
        asked = {"url": self.engine.url, "role": role}
        async with self.engines._session.post(self.engines.url + "/instances/role", json=asked) as response:
            return Answer(response.status, {}, await response.json())

    async def serves_as(self, role: str) -> None:
        async def so() -> bool:
            listed = [(await proxy.get("/instances"))["instances"] for proxy in self.proxies]
            shown = [one for instances in listed for one in instances if one["url"] == self.engine.url]
            return all((one["role"], one["state"]) == (role, "READY") for one in shown)

        await eventually(so, 120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with cluster(FAMILY, "1e2p1d", kv_handoff="push", restarts=100) as engines:
        deployment = engines.deployment
        deployment.keep_alive()
        flags = ["--port", "0", "--host", "127.0.0.1", "--kv-handoff", "pull", "--log-level", "warning"]
        for role in ("encode", "prefill", "decode"):
            flags += [f"--{role}-servers-urls", ",".join(child.url for child in deployment.role(role))]
        other = Child("other proxy", "proxy", flags)
        await other.start()
        try:
            await ready(engines.client(other))
            yield Fleet(engines, (engines, engines.client(other)))
        finally:
            await other.stop()


@asynccontextmanager
async def load(proxies: Sequence[Client]) -> AsyncIterator[list[str]]:
    """Clients that ask one after the other, and what each answer said of its route. Leaving it checks all of them."""
    routes: list[str] = []
    wrong: list[object] = []
    over = asyncio.Event()

    async def client(number: int, proxy: Client) -> None:
        while not over.is_set():
            case = CASES[number % len(CASES)]
            number += 1
            answer = await proxy.chat(case.content, max_tokens=12, stream=bool(number % 2))
            if answer.status != 200 or answer.error or answer.text != case.expected(FAMILY):
                wrong.append((case.name, answer))
            routes.append(answer.headers.get("x-triptych-route", ""))

    clients = [asyncio.create_task(client(number, proxy)) for number in range(CLIENTS) for proxy in proxies]
    try:
        yield routes
    finally:
        over.set()
        await asyncio.gather(*clients)
    assert not wrong


async def test_roles_change_under_load_and_every_answer_is_exact(fleet: Fleet) -> None:
    netloc = fleet.engine.url.removeprefix("http://")
    async with load(fleet.proxies) as routes:
        for role in ("decode", "prefill"):
            answer = await fleet.turn(role)
            assert answer.body["role"] == role
            await fleet.serves_as(role)
            seen = len(routes)
            await until(lambda: sum(f"{role}={netloc}" in route for route in routes[seen:]) >= ROUTES, 60)  # noqa: B023
    await fleet.engines.idle()


async def test_an_engine_killed_on_the_way_is_what_it_was_started_as(fleet: Fleet) -> None:
    direct = fleet.engines.client(fleet.engine)
    await fleet.turn("both")
    await fleet.serves_as("both")
    async with load([fleet.engines]):  # its proxy has drained the engine before it asks it
        kept = asyncio.create_task(direct.chat("Tell me everything.", max_tokens=2000, ignore_eos=True))

        async def busy() -> bool:
            return bool((await direct.get("/info"))["running"])

        await eventually(busy)
        asking = asyncio.create_task(fleet.turn("decode"))

        async def on_its_way() -> bool:
            return bool((await direct.get("/info"))["turning_to"] == "decode")

        await eventually(on_its_way)
        fleet.engine.signal(signal.SIGKILL)
        answer = await asking
        assert (answer.status, answer.error["type"]) == (502, "engine_error")  # type: ignore[index]
        await asyncio.gather(kept, return_exceptions=True)
        await fleet.serves_as("prefill")
    await fleet.engines.idle()
