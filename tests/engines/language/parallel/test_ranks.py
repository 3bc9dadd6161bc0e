"""Engines of two ranks each, as processes: the tokens are those of one `transformers` model whatever way a request
takes, and no rank outlives another.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from deploy.processes import Child
from engines.errors import SetupError
from engines.language.parallel.ranks import device_of, started
from engines.settings import LanguageSettings
from tests.engines.language.test_exact import (
    COMMON,
    FAMILY,
    SHORT,
    WAYS,
    Engines,
    content_of,
    greedy,
    published,
    text_of,
    through_pull,
    through_push,
)
from tests.support.checkpoints import checkpoint
from tests.support.drive import case
from tests.support.metaserver import metaserver
from tests.support.waiting import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

RANKS = ["--tensor-parallel", "2", "--rank-timeout", "5", "--no-prefix-cache"]
ENGINES = {
    "prefill": ["--kv-blocks", "200", "--max-batched-tokens", "48", "--layers-per-push", "2", "--kv-mirror"],
    "decode": ["--kv-blocks", "44"],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        common = ["--model", str(checkpoint(FAMILY)), *COMMON, *RANKS]
        children = {name: Child(name, "engines.language", [*common, *own]) for name, own in ENGINES.items()}
        try:
            await asyncio.gather(*(child.start() for child in children.values()))
            yield Engines(session, {**children, "both": children["decode"]})
        finally:
            await asyncio.gather(*(child.stop(20) for child in children.values()))


def other_rank(engine: Child) -> int:
    """The pid of rank 1."""
    (pid,) = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
    return int(pid)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def ended(engine: Child) -> tuple[int, str]:
    """Status and last line of an engine that ends by itself."""
    async with asyncio.timeout(30):
        code = await engine.wait()
    return code, engine.last_lines.splitlines()[-1]


@pytest.mark.parametrize("name", ["one", "long"])
@pytest.mark.parametrize("way", WAYS)
async def test_two_ranks_give_the_reference_tokens(engines: Engines, way: str, name: str) -> None:
    wanted = case(FAMILY, name)
    async with published(wanted) as entries:
        answer = await WAYS[way](engines, greedy(content_of(name)), entries)
    assert answer.status == 200, answer.body
    assert answer.text == text_of(wanted.expected)
    await engines.idle("prefill", "decode")


async def test_forks_have_blocks_of_their_own_on_every_rank(engines: Engines) -> None:
    wanted = case(FAMILY, "one")
    async with published(wanted) as entries:
        answer = await through_pull(engines, greedy(content_of("one"), n=3), entries)
    assert [choice["message"]["content"] for choice in answer.choices] == [text_of(wanted.expected)] * 3
    await engines.idle("prefill", "decode")


async def test_what_is_swapped_out_comes_back_on_every_rank(engines: Engines) -> None:
    bodies = [greedy(content, 40, ignore_eos=True) for content in SHORT * 2]
    alone = [(await engines["prefill"].post("/v1/chat/completions", body)).text for body in bodies[: len(SHORT)]]
    together = await asyncio.gather(*(engines["decode"].post("/v1/chat/completions", body) for body in bodies))
    assert [answer.text for answer in together] == alone * 2
    assert (await engines["decode"].get("/info"))["preemptions"] > 0
    await engines.idle("decode")


async def test_a_client_that_goes_away_frees_every_rank(engines: Engines) -> None:
    task = asyncio.create_task(through_push(engines, greedy("word " * 100, 90, ignore_eos=True), {}))
    await asyncio.sleep(0.3)  # anywhere between the handshake and the last token
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engines.idle("prefill", "decode")


async def test_another_number_of_ranks_is_refused_at_the_handshake(engines: Engines) -> None:
    told: list[dict[str, Any]] = []

    async def prefill(descriptor: dict[str, Any]) -> tuple[int, Any]:
        """A prefill of one rank, which gets two offers, and one of two, which gets one."""
        told.append(descriptor)
        offer = descriptor["offer"]["ranks"][0]
        params = {"kv_transfer_params": {**descriptor, "offer": offer}, "stream": False, "max_tokens": 1}
        answer = await engines["prefill"].post("/v1/chat/completions", {**greedy("Hi"), **params})
        return answer.status, answer.body

    async with metaserver(prefill) as url:
        params = {"do_remote_prefill": True, "metaserver": url}
        answer = await engines["decode"].post("/v1/chat/completions", {**greedy("Hi"), "kv_transfer_params": params})
    assert told[0]["remote_tp_size"] == len(told[0]["offer"]["ranks"]) == 2
    assert answer.error is not None
    assert (answer.error["code"], answer.error["retryable"]) == ("layout_mismatch", False)
    assert "--tensor-parallel is 1 at the peer and 2 here" in answer.error["message"]

    handed = await engines["prefill"].post(
        "/v1/chat/completions", {**greedy("Hi"), "kv_transfer_params": {"do_remote_decode": True}, "max_tokens": 1}
    )
    params = handed.body["kv_transfer_params"]
    assert params["tp_size"] == 2
    params["where"] = params["where"]["ranks"][0]
    answer = await engines["decode"].post("/v1/chat/completions", {**greedy("Hi"), "kv_transfer_params": params})
    assert answer.error is not None
    assert "--tensor-parallel is 1 at the peer and 2 here" in answer.error["message"]
    await engines.idle("decode")


# -- the last tests of this file: each ends one of its engines ---------------------------------------------------------


async def test_a_rank_that_is_stopped_ends_the_engine_within_its_deadline(engines: Engines) -> None:
    """Before a push: decode hears of it, and has its blocks back."""
    engine = engines.children["prefill"]
    pid = other_rank(engine)
    os.kill(pid, signal.SIGSTOP)
    answer = await through_push(engines, greedy("word " * 100, 90, ignore_eos=True), {})
    assert answer.error is not None
    assert answer.error["retryable"]
    code, line = await ended(engine)
    assert code == 1
    assert f"rank 1 (pid {pid}) does not answer: an engine cannot go on without all of its 2 ranks" in line
    assert not alive(pid)
    await engines.idle("decode")


async def test_a_rank_that_is_killed_ends_the_engine_at_once(engines: Engines) -> None:
    engine = engines.children["decode"]
    pid = other_rank(engine)
    body = greedy("Tell me a story.", 500, ignore_eos=True)
    task = asyncio.create_task(engines["decode"].post("/v1/chat/completions", body))

    async def decoding() -> bool:
        return bool((await engines["decode"].get("/info"))["running"])

    await eventually(decoding)
    os.kill(pid, signal.SIGKILL)
    answer = await task
    assert answer.error is not None
    assert (answer.status, answer.error["retryable"]) == (503, True)
    code, line = await ended(engine)
    assert code == 1
    assert f"rank 1 (pid {pid}) was ended by SIGKILL: an engine cannot go on" in line


# -- without an engine -------------------------------------------------------------------------------------------------


async def test_a_rank_that_cannot_start_says_why_and_ends_with_rank_0(tmp_path: Path) -> None:
    settings = LanguageSettings(model=tmp_path / "nothing", tensor_parallel=2)
    async with started(settings) as ranks:
        with pytest.raises(SetupError, match=r"rank 1: --model .* is not a folder"):
            await ranks.load()
        (link,) = ranks.links
        link.close()
        assert await link.ended(30)
    assert link.process.returncode == 0


async def test_a_process_that_ends_at_once_is_an_error_of_the_start(tmp_path: Path) -> None:
    async with started(LanguageSettings(model=tmp_path, tensor_parallel=2)) as ranks:
        ranks.links[0].process.kill()
        with pytest.raises(SetupError, match=r"rank 1 \(pid \d+\) was ended by SIGKILL while it started"):
            await ranks.load()


async def test_a_process_that_is_stopped_at_once_is_an_error_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.language.parallel.ranks.FIRST_WORDS", 0.2)
    async with started(LanguageSettings(model=tmp_path, tensor_parallel=2)) as ranks:
        ranks.links[0].process.send_signal(signal.SIGSTOP)
        with pytest.raises(SetupError, match=r"rank 1 \(pid \d+\) does not answer while it started"):
            await ranks.load()


async def test_each_rank_has_a_device_of_its_own() -> None:
    assert [device_of("cuda:2", rank) for rank in range(2)] == ["cuda:2", "cuda:3"]
    assert [device_of("cuda", 1), device_of("cpu", 1)] == ["cuda:1", "cpu"]
