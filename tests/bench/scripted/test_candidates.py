import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.scripted import candidates
from bench.scripted.candidates import Fleet, NotStarted, Options, running
from bench.scripted.engine import Engine
from bench.scripted.load import connected

FLEET = Fleet((), ("http://p:1",), ("http://d:2", "http://e:3"))


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    async with Engine("encode") as encode, Engine("prefill") as prefill, Engine("decode") as decode:
        yield Fleet((encode.url,), (prefill.url,), (decode.url,))


@pytest.mark.parametrize("name", ["triptych-push", "triptych-pull", "nginx", "bare"])
async def test_a_candidate_serves_and_leaves_nothing(name: str) -> None:
    if name == "nginx" and candidates.found(name, Options()) is None:
        pytest.skip("nginx is not installed")
    async with fleet() as engines:
        async with running(name, engines, Options()) as candidate, connected(candidate.url, 2):
            pids = candidate.pids
            assert len(pids) == (2 if name == "nginx" else 1)
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_a_candidate_that_ends_says_why() -> None:
    async with fleet() as engines:
        with pytest.raises(NotStarted, match=r"ended with 2:(\n|.)*--nonsense"):
            async with running("triptych-push", engines, Options(arguments=("--nonsense",))):
                pass


def test_routers_are_told_their_engines(tmp_path: Path) -> None:
    for name in ("vllm-router", "sglang-router"):
        program = tmp_path / name
        program.write_text("")
        program.chmod(0o755)
    options = Options(tmp_path)
    vllm = candidates.command_of("vllm-router", FLEET, options, 9, tmp_path)
    sglang = candidates.command_of("sglang-router", FLEET, options, 9, tmp_path)
    assert vllm[:8] == [
        str(tmp_path / "vllm-router"),
        "--vllm-pd-disaggregation",
        *("--prefill", "http://p:1", "--decode", "http://d:2", "--decode", "http://e:3"),
    ]
    assert sglang[1:6] == ["launch", "--pd-disaggregation", "--prefill", "http://p:1", "8998"]


def test_a_peer_that_is_missing_is_not_found(tmp_path: Path) -> None:
    assert candidates.known(["nginx"]) == ["nginx"]
    with pytest.raises(ValueError, match="no peer 'caddy'"):
        candidates.known(["caddy"])
    with pytest.raises(NotStarted, match="vllm-router is not installed"):
        candidates.command_of("vllm-router", FLEET, Options(tmp_path), 9, tmp_path)
