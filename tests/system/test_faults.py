"""Honest under failure: engines killed or frozen, clients gone, in every phase of a request.

Each test ends the same way: the client got a truthful answer within its deadline, nothing is held by anybody, and the
next request is served exactly once the engine is back. `stopped` engines are resumed afterwards: what they still had in
flight must corrupt nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from tests.support.cluster import Answer, Cluster, cluster
from tests.support.pictures import image_file, image_part
from tests.support.waiting import eventually
from tests.system.cases import CASES

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FAMILY = "qwen2_5_vl"
PROXY = ("--encode-timeout", "6", "--prefill-timeout", "10", "--first-token-timeout", "8", "--stream-idle-timeout", "4")
ENGINES = ("--transfer-timeout", "5", "--grace", "2")
LEASES = {"prefill": ("--kv-lease", "3", "--no-prefix-cache"), "decode": ("--metaserver-timeout", "8")}
EVERYTHING = "everything"  # at once: two ranks, mirrored caches, embeddings in many pieces, a shared store
RANKS = ("--tensor-parallel", "2", "--rank-timeout", "20", "--kv-mirror")
PIECES = ("--embedding-bytes", "1MiB", "--embedding-block-tokens", "1", "--embedding-default-tokens", "64")
DEADLINE = 25.0
MAY_RESTART = asyncio.Event()
MAY_RESTART.set()
BIG = [image_part(image_file(1400, 1000, seed=seed)) for seed in range(6)]
NOVEL = "It was a dark and stormy night; the rain fell in torrents. " * 90


@dataclass(frozen=True)
class Phase:
    """A request that stays in one phase for a while, and how to see that it is there."""

    name: str
    content: object
    fields: dict[str, Any]
    reached: Callable[[Cluster], Awaitable[bool]]


async def encoding(cluster: Cluster) -> bool:
    return any(i["role"] == "encode" and i["leases"] for i in (await cluster.get("/instances"))["instances"])


async def prefilling(cluster: Cluster) -> bool:
    return bool((await cluster.info("prefill"))["running"])


async def transferring(cluster: Cluster) -> bool:
    """Push: a chunk has been computed, so its layers are on their way. Pull: the prompt's blocks are published."""
    audit = (await cluster.info("prefill"))["transfer"]["audit"]
    return bool(audit["pushes"] or audit["publications"])


async def decoding(cluster: Cluster) -> bool:
    return bool((await cluster.info("decode"))["running"])


PHASES = {
    phase.name: phase
    for phase in (
        Phase("encode", [*BIG, {"type": "text", "text": "What are these?"}], {"max_tokens": 4}, encoding),
        Phase("prefill", NOVEL, {"max_tokens": 4}, prefilling),
        Phase("transfer", NOVEL, {"max_tokens": 4}, transferring),
        Phase("decode", "Tell me everything.", {"max_tokens": 2000, "ignore_eos": True}, decoding),
    )
}
STRUCK = [
    ("encode", "encode"),
    ("prefill", "prefill"),
    ("prefill", "decode"),
    ("transfer", "prefill"),
    ("transfer", "decode"),
    ("decode", "decode"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["push", "pull", EVERYTHING])
async def deployment(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    options: dict[str, Any] = {
        "kv_handoff": request.param,
        "proxy_arguments": PROXY,
        "engine_arguments": ENGINES,
        "role_arguments": LEASES,
        "restarts": 100,
    }
    if request.param == EVERYTHING:
        if os.environ.get("TRIPTYCH_PARTS") != "required":
            pytest.skip("takes minutes: make faults runs it")
        roles = {role: (*flags, *RANKS, *PIECES) for role, flags in LEASES.items()}
        options |= {"kv_handoff": "push", "role_arguments": roles, "embedding_store": "64MiB"}
    async with cluster(FAMILY, "1e1p1d", **options) as running:
        for child in running.deployment.engines.values():
            child.start = partial(start_when_allowed, child.start)  # type: ignore[method-assign]
        running.deployment.keep_alive()
        yield running


async def start_when_allowed(start: Callable[[float], Awaitable[str]], timeout: float) -> str:
    await MAY_RESTART.wait()
    return await start(timeout)


@contextmanager
def staying_dead() -> Iterator[None]:
    """Within, no engine is started again: one that is back soon enough serves what its death would have failed."""
    MAY_RESTART.clear()
    try:
        yield
    finally:
        MAY_RESTART.set()


@asynccontextmanager
async def in_phase(
    cluster: Cluster, phase: Phase, stream: bool, frozen: str = ""
) -> AsyncIterator[asyncio.Task[Answer]]:
    """Send the phase's request, and run the body once it is there.

    A pull takes milliseconds, so its decode engine, which is asked for nothing before the prefill is done, is frozen
    until the end of the body; `frozen` names an engine that the body freezes and that must stay so.
    """
    held = cluster.engine("decode") if phase.name == "transfer" and cluster.deployment.kv_handoff == "pull" else None
    if held is not None:
        held.signal(signal.SIGSTOP)
    try:
        task = asyncio.create_task(cluster.chat(phase.content, stream=stream, timeout=DEADLINE, **phase.fields))
        await seen(cluster, task, phase)
        yield task
    finally:
        if held is not None and frozen != "decode":
            held.signal(signal.SIGCONT)


async def seen(cluster: Cluster, task: asyncio.Task[Answer], phase: Phase) -> None:
    async def reached() -> bool:
        return task.done() or await phase.reached(cluster)

    await eventually(reached, 15)
    assert not task.done(), f"over before it was seen in {phase.name}: {task.result().body or task.result().events}"


async def serves_exactly(cluster: Cluster) -> None:
    """Everything is given back, all engines are back, and a request through all three stages is answered exactly."""
    await cluster.idle(60)
    await eventually(lambda: all_ready(cluster), 30)
    case = CASES[2]
    answer = await cluster.chat(case.content, max_tokens=12)
    assert answer.status == 200, answer.error
    assert answer.text == case.expected(FAMILY, 12)
    await cluster.idle(30)


async def all_ready(cluster: Cluster) -> bool:
    return all(instance["state"] == "READY" for instance in (await cluster.get("/instances"))["instances"])


def assert_truthful(answer: Answer, stages: set[str]) -> None:
    """An error status with the error contract, or a stream that ends with an error event and no [DONE]."""
    assert answer.error is not None, f"no error in {answer}"
    assert not answer.done
    assert answer.status == 200 if answer.events else answer.status >= 500
    assert answer.error["message"]
    assert answer.error["stage"] in stages
    assert {"type", "param", "code", "retryable"} <= answer.error.keys()


@pytest.mark.parametrize(("phase", "role"), STRUCK, ids=lambda name: name)
async def test_a_killed_engine_fails_its_request_truthfully(deployment: Cluster, phase: str, role: str) -> None:
    streamed = deployment.deployment.kv_handoff == "push"  # and whole answers with pull
    with staying_dead():
        async with in_phase(deployment, PHASES[phase], streamed) as task:
            deployment.engine(role).signal(signal.SIGKILL)
        answer = await task
    assert_truthful(answer, {role, phase if phase != "transfer" else "prefill"})
    await serves_exactly(deployment)


@pytest.mark.parametrize(("phase", "role"), STRUCK, ids=lambda name: name)
async def test_a_frozen_engine_fails_its_request_by_the_deadline(deployment: Cluster, phase: str, role: str) -> None:
    engine = deployment.engine(role)
    try:
        async with in_phase(deployment, PHASES[phase], stream=True, frozen=role) as task:
            engine.signal(signal.SIGSTOP)
        assert_truthful(await task, {role, phase if phase != "transfer" else "prefill", "decode"})
    finally:
        engine.signal(signal.SIGCONT)
    await serves_exactly(deployment)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_client_that_leaves_takes_its_request_along(deployment: Cluster, phase: str, stream: bool) -> None:
    async with in_phase(deployment, PHASES[phase], stream) as task:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await deployment.idle(10)
    await serves_exactly(deployment)


async def test_an_engine_that_is_not_needed_any_more_may_die(deployment: Cluster) -> None:
    """Once D has the KV cache, P's death costs nothing."""
    short = replace(PHASES["decode"], fields={"max_tokens": 300, "ignore_eos": True})
    async with in_phase(deployment, short, stream=True) as task:
        deployment.engine("prefill").signal(signal.SIGKILL)
    answer = await task
    assert answer.done, answer.error
    assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
    await serves_exactly(deployment)


async def test_text_is_served_while_the_only_encoder_is_frozen(deployment: Cluster) -> None:
    encoder = deployment.engine("encode")
    encoder.signal(signal.SIGSTOP)
    try:
        answer = await deployment.chat(CASES[1].content, max_tokens=4, timeout=DEADLINE)
        assert_truthful(answer, {"encode", "proxy"})
        text = await deployment.chat("Still there?", max_tokens=4, timeout=DEADLINE)
        assert text.status == 200
    finally:
        encoder.signal(signal.SIGCONT)
    await serves_exactly(deployment)
