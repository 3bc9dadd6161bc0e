"""The embedding store in a whole deployment: what one encoder computed spares every other one, and is there when its
encoder is not; what the store has lost is computed again, and no request notices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deploy.processes import Child
from tests.support.cluster import Client, Cluster, cluster
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually
from tests.system.cases import CASES, TALL, WIDE, Case

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen3_vl"
PICTURED = [case for case in CASES if case.images]
PATIENT = ("--embedding-store-timeout", "3")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Cluster]:
    async with cluster(FAMILY, "2e1pd", engine_arguments=PATIENT, embedding_store="64MiB", restarts=100) as running:
        running.deployment.keep_alive()
        yield running


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def at_rest(deployment: Cluster) -> AsyncIterator[None]:
    for child in deployment.deployment.engines.values():
        await connected(deployment.client(child))
    yield
    await deployment.idle()


async def connected(engine: Client) -> None:
    async def so() -> bool:
        try:
            return bool((await engine.get("/info"))["embedding_store"]["connected"])
        except OSError:
            return False

    await eventually(so, 40)


async def store_of(engine: Client) -> Mapping[str, Any]:
    return dict((await engine.get("/info"))["embedding_store"])


async def forwards(engine: Client) -> float:
    lines = (await engine.text("/metrics")).splitlines()
    return float(next(line for line in lines if line.startswith("triptych_encode_forward_seconds_count")).split()[1])


async def encode(encoder: Client, *images: bytes) -> dict[str, Any]:
    """Its entries, once it has put into the store what it computed."""
    before = await store_of(encoder)
    answer = await encoder.chat([image_part(image) for image in images])
    assert answer.status == 200, answer.error

    async def settled() -> bool:
        now = await store_of(encoder)
        looked, wrote = (since(before[kind], now[kind]) for kind in ("lookups", "writes"))
        return sum(wrote.values()) == sum(looked.values()) - looked["hit"]

    await eventually(settled)
    return dict(answer.body["ec_transfer_params"])


def since(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {result: count - before[result] for result, count in now.items()}


async def struck(cluster: Cluster, child: Child) -> None:
    """Kill it, and wait until it serves again."""
    pid = child.pid
    child.signal(signal.SIGKILL)

    async def again() -> bool:
        try:
            served_by = (await cluster.client(child).get("/info"))["pid"]
        except OSError:
            return False
        instances = (await cluster.get("/instances"))["instances"]
        return served_by != pid and all(one["state"] == "READY" for one in instances)

    await eventually(again, 100)
    await connected(cluster.client(child))


async def answer(case: Case, cluster: Cluster) -> None:
    got = await cluster.chat(case.content, max_tokens=12)
    assert got.text == case.expected(FAMILY), (case.name, got.error)


async def test_what_one_encoder_computed_another_finds_without_a_forward(deployment: Cluster) -> None:
    first, second = (deployment.client(child) for child in deployment.deployment.role("encode"))
    image = image_file(200, 120, seed=71)
    made = await encode(first, image)
    before = await forwards(second)
    found = await encode(second, image)
    assert await forwards(second) == before
    assert (await store_of(second))["lookups"]["hit"] >= 1
    unplaced = [{**entry, "where": None} for entry in (*made.values(), *found.values())]
    assert made.keys() == found.keys() and unplaced[0] == unplaced[1]


async def test_answers_out_of_the_store_are_exact_when_the_encoder_has_died(deployment: Cluster) -> None:
    children = deployment.deployment.role("encode")
    encoders = [deployment.client(child) for child in children]
    entries = await encode(encoders[0], WIDE)
    await encode(encoders[0], TALL)
    await struck(deployment, children[0])
    before = [await forwards(encoder) for encoder in encoders]
    await prefilled_by_a_handle_of_a_former_life(deployment.client(deployment.engine("both")), entries)
    for case in PICTURED:
        await answer(case, deployment)
    assert [await forwards(encoder) for encoder in encoders] == before


async def prefilled_by_a_handle_of_a_former_life(engine: Client, entries: Mapping[str, Any]) -> None:
    before = (await store_of(engine))["lookups"]["hit"]
    ((mm_hash, entry),) = entries.items()
    part = {"type": "image_embeds", "image_embeds": entry["metadata"], "uuid": mm_hash}
    asked = [part, {"type": "text", "text": "What is this?"}]
    got = await engine.chat(asked, max_tokens=12, ec_transfer_params=entries)
    assert got.text == Case("one image", (WIDE, "What is this?")).expected(FAMILY), got.error
    assert (await store_of(engine))["lookups"]["hit"] == before + 1


@pytest.mark.parametrize("blow", ["hangs", "is killed"])
async def test_a_store_that_fails_fails_no_request(deployment: Cluster, blow: str) -> None:
    store = deployment.deployment.store
    assert store is not None
    (master,) = (int(pid) for pid in Path(f"/proc/{store.pid}/task/{store.pid}/children").read_text().split())
    asked = []
    for number in range(4):
        case = Case(f"{blow} {number}", (image_file(90 + 30 * number, 120, seed=80 + len(blow)), "What is this?"))
        asked.append(asyncio.create_task(answer(case, deployment)))
        if number == 1:
            os.kill(master, signal.SIGSTOP if blow == "hangs" else signal.SIGKILL)
    await asyncio.gather(*asked)
    if blow == "hangs":
        os.kill(master, signal.SIGCONT)
    for child in deployment.deployment.engines.values():
        await connected(deployment.client(child))
    await answer(PICTURED[0], deployment)
