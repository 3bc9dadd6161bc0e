import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from deploy.processes import Child, StartError
from deploy.up import argument_parser, tiny_checkpoint
from tests.support.checkpoints import checkpoint
from tests.support.waiting import until

STORES: tuple[tuple[str, ...], ...] = ((), ("--embedding-store",), ("--embedding-store", "64MiB"))


def up(*flags: str) -> tuple[Child, list[str]]:
    lines: list[str] = []
    common = ["--port", "0", "--model", str(checkpoint("qwen2_vl"))]
    return Child("up", "deploy.up", [*common, *flags], lambda _, line: lines.append(line)), lines


async def answer(url: str) -> int:
    body = {"model": checkpoint("qwen2_vl").name, "prompt": "hello", "max_tokens": 2}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as response:
        return response.status


async def test_a_deployment_serves_outlives_an_engine_and_leaves_nothing() -> None:
    deployment, lines = up("--topology", "1pd")
    url = await deployment.start()
    try:
        assert await answer(url) == 200
        engine = next(child for child in children(deployment.pid) if "engines.language" in command(child))
        engine_url = next(line for line in lines if line.startswith("both-0")).split()[1]
        os.kill(engine, signal.SIGKILL)
        await until(lambda: sum(engine_url in line for line in lines) == 2, 60)
        async with asyncio.timeout(30):
            while await answer(url) != 200:
                await asyncio.sleep(0.2)
        mine = children(deployment.pid)
        assert len(mine) == 2
    finally:
        code = await deployment.stop(grace=20)
    assert code == 0
    assert not [child for child in mine if Path(f"/proc/{child}").exists()]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


async def test_an_engine_that_cannot_start_stops_everything_and_says_why(tmp_path: Path) -> None:
    deployment = Child("up", "deploy.up", ["--port", "0", "--topology", "1pd", "--model", str(tmp_path / "nowhere")])
    with pytest.raises(StartError, match="nowhere is not a folder"):
        await deployment.start(60)


def test_a_wrong_topology_is_refused_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--topology", "3d"])
    assert "write 1e1p1d" in capsys.readouterr().err


def test_a_store_has_a_size_whether_one_is_given_or_not() -> None:
    asked = {flags: argument_parser().parse_args(flags).embedding_store for flags in STORES}
    assert list(asked.values()) == ["", "1GiB", "64MiB"]


async def test_the_tiny_checkpoint_is_made_once(tmp_path: Path) -> None:
    folder = await tiny_checkpoint("qwen2_vl", tmp_path / "tiny")
    made = (folder / "config.json").stat().st_mtime_ns
    assert await tiny_checkpoint("qwen2_vl", folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
