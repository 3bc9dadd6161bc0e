"""The manifests as the programs that would read them do: docker-compose, kubectl and systemd, without their daemons."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = sorted(file for file in (DEPLOY / "compose").glob("*.yaml") if file.stem != "common")


def said(*command: str | Path) -> str:
    """What a command prints; it must end well, with no word of complaint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.stem)
def test_docker_compose_takes_it(part: Callable[[str], str], file: Path) -> None:
    services = yaml.safe_load(said(part("docker-compose"), "--file", file, "config"))["services"]
    engines = [service for service in services.values() if service["image"].startswith("triptych-engines:")]
    assert engines
    assert all(service["environment"]["TRIPTYCH_MODEL"] == "/models/Qwen3-VL-4B-Instruct" for service in engines)
