"""A decode engine is killed in the middle of a stream, and the client reads on: the same tokens, one id, one usage."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.cluster import Cluster, cluster
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen2_5_vl"
TOKENS = 160
CONTENT = [image_part(image_file(56, 84, seed=3)), {"type": "text", "text": "Tell me everything."}]
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 0.9, "seed": 17, "top_p": 0.9}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["push", "pull"])
async def deployment(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    options: dict[str, Any] = {"kv_handoff": request.param, "proxy_arguments": ("--resume",), "restarts": 100}
    async with cluster(FAMILY, "1e1p2d", **options) as running:
        running.deployment.keep_alive()
        yield running


async def all_ready(cluster: Cluster) -> bool:
    return all(instance["state"] == "READY" for instance in (await cluster.get("/instances"))["instances"])


@pytest.mark.parametrize("fields", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_killed_decode_engine_is_not_noticed(deployment: Cluster, fields: dict[str, Any]) -> None:
    await eventually(lambda: all_ready(deployment), 60)
    asked = {"max_tokens": TOKENS, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    wanted = await deployment.chat(CONTENT, **asked, **fields)
    assert wanted.done and wanted.events[-1]["usage"]["completion_tokens"] == TOKENS
    killing = asyncio.create_task(kill_the_one_that_decodes(deployment))
    events = await read(deployment, {"messages": [{"role": "user", "content": CONTENT}], **asked, **fields})
    assert await killing, "it was over before an engine could be killed"
    assert events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    assert not [event for event in parsed if "error" in event]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in parsed if event["choices"])
    assert text == wanted.text
    assert parsed[-1]["usage"] == wanted.events[-1]["usage"]
    assert len({event["id"] for event in parsed}) == 1
    assert not any("token_ids" in choice for event in parsed for choice in event["choices"])
    metrics = await resumes(deployment)
    assert metrics >= 1
    await deployment.idle(60)


async def kill_the_one_that_decodes(cluster: Cluster) -> bool:
    """True once it is dead; False if nobody decoded in time."""
    async with asyncio.timeout(30):
        while True:
            for child in cluster.deployment.role("decode"):
                if (await cluster.client(child).get("/info"))["running"]:
                    await asyncio.sleep(0.1)
                    child.signal(signal.SIGKILL)
                    return True
            await asyncio.sleep(0.01)


async def read(cluster: Cluster, body: dict[str, Any]) -> list[str]:
    async with cluster._session.post(f"{cluster.url}/v1/chat/completions", json={"model": "tiny", **body}) as response:
        assert response.status == 200
        return [event.removeprefix("data: ") for event in (await response.text()).split("\n\n") if event]


async def resumes(cluster: Cluster) -> float:
    async with cluster._session.get(f"{cluster.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("triptych_resumes_total"))
