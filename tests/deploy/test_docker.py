"""The images cannot be built here: they are linted, and what they name is looked up in the tree."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import COMMANDS
from deploy.system_libraries import PACKAGES
from tests.fakes.deployment import deployment

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def instructions(file: Path, name: str) -> list[str]:
    """The arguments of every `name`, with lines that go on joined."""
    text = re.sub(r"\\\n(\s*#.*\n)*", "", file.read_text())
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(name + " ")]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets it through: the last line that matches it or a folder of it decides."""
    wanted = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").replace("**/", "*")
        tops = [path, *(str(parent) for parent in Path(path).parents)]
        if any(fnmatch.fnmatch(top, pattern) for top in tops):
            wanted = line.startswith("!")
    return wanted


def test_there_is_an_image_for_each_half() -> None:
    assert [file.name for file in FILES] == ["engines.Dockerfile", "proxy.Dockerfile"]


def test_hadolint_finds_nothing(file: Path) -> None:
    found = subprocess.run([HADOLINT, "--format", "gnu", file], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_what_is_copied_is_in_the_tree_and_in_the_context(file: Path) -> None:
    copied = [s for line in instructions(file, "COPY") if "--from" not in line for s in line.split()[:-1]]
    assert {"proxy", "engines", "deploy", "bench", "pyproject.toml", "requirements.lock"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        inside = [name] if (ROOT / name).is_file() else [f"{name}/__init__.py"]
        assert all(map(in_context, inside)), name


def test_what_has_no_business_in_an_image_stays_out() -> None:
    assert in_context("deploy/cli.py")
    for path in (
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "bench/plots/decider.png",
        "deploy/OPERATING.md",
    ):
        assert not in_context(path), path


def test_it_runs_a_command_of_ours_as_nobody(file: Path) -> None:
    assert instructions(file, "USER") == ["65532:65532"]
    assert json.loads(instructions(file, "ENTRYPOINT")[0]) == ["triptych"]
    assert json.loads(instructions(file, "CMD")[0])[0] in COMMANDS


def test_the_engines_bring_what_mooncake_loads() -> None:
    installed = " ".join(instructions(ROOT / "deploy/docker/engines.Dockerfile", "RUN")).split()
    assert set(PACKAGES.values()) <= set(installed)


def test_what_is_installed_is_what_the_lock_says(file: Path) -> None:
    commands = [c for line in instructions(file, "RUN") for c in line.split("&&") if "pip install" in c]
    assert commands
    assert all("--constraint requirements.lock" in command for command in commands)


async def test_the_health_check_says_whether_the_proxy_answers() -> None:
    (said,) = instructions(ROOT / "deploy/docker/proxy.Dockerfile", "HEALTHCHECK")
    program, *arguments = json.loads(said.partition(" CMD ")[2])
    assert program == "python"

    async def status(port: int) -> int | None:
        environment = {"TRIPTYCH_PORT": str(port)}
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment, stderr=quiet)
        return await process.wait()

    async with deployment("1b") as d:
        assert await status(d.proxy.port) == 0
        port = d.proxy.port
    assert await status(port) == 1
