"""`triptych bench` as a process, before a proxy with engines that play."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.load import __main__ as load
from tests.fakes.deployment import deployment


async def run(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "bench", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_a_mixture_is_asked_and_measured(tmp_path: Path) -> None:
    async with deployment("1e1p1d") as found:
        asked = ["--requests", "12", "--concurrency", "3", "--images", "1", "--image-share", "0.5", "--max-tokens", "4"]
        told = ["--json", "--plot", str(tmp_path / "load.png")]
        status, out, err = await run("--url", f"{found.proxy.url}/v1", *asked, *told, "--image-size", "32x32")
        assert status == 0, err
        report = json.loads(out)
        by_kind = {row["kind"]: row for row in report["rows"]}
        assert by_kind["all"]["requests"] == 12 == by_kind["text"]["requests"] + by_kind["image"]["requests"]
        assert by_kind["all"]["failed"] == 0 and by_kind["image"]["ttft p50"] > 0
        assert "E-P-D" in err and "P-D" in err
        Image.open(tmp_path / "load.png").load()
        status, out, _ = await run("--url", found.proxy.url, "--rate", "50", "--seconds", "0.3", "--no-stream")
        assert status == 0 and "kind" in out and "holds" in out


async def test_failures_are_counted_and_told(unused_tcp_port: int) -> None:
    status, _, err = await run("--url", f"http://127.0.0.1:{unused_tcp_port}")
    assert status == 2 and "cannot be reached" in err
    async with deployment("1b") as found:
        arguments = ["--url", found.proxy.url, "--extra", '{"kv_transfer_params": {}}', "--requests", "3"]
        status, _, err = await run(*arguments)
        assert status == 2 and "the warm-up was not served: 400" in err
        status, out, err = await run(*arguments, "--warm-up", "0")
        assert status == 1 and "DOES NOT HOLD" in out
        assert "kv_transfer_params" in err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--image-size", "big"], "looks like 640x480"),
        (["--image-share", "2"], "between 0 and 1"),
        (["--rate", "0"], "more than 0"),
        (["--rate", "fast"], "--rate: 'fast' is no number"),
        (["--image-share", "half"], "--image-share: 'half' is no number"),
        (["--requests", "few"], "--requests: a whole number, at least 1"),
        (["--requests", "0"], "at least 1"),
        (["--extra", "[]"], "not a JSON object"),
        (["--extra", "{"], "not JSON"),
    ],
)
def test_wrong_flags_are_explained(wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load.main(wrong)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
