"""The units start what our settings accept; systemd itself reads them in tests/operations/test_manifests.py."""

from __future__ import annotations

import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest

from engines.settings import EngineSettings
from proxy.settings import ProxySettings
from tests.support.commands import settings_of

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
CONFIGURATIONS = {"proxy": "proxy", "encoder-0": "encoder@", "prefill-0": "language@", "decode-0": "language@"}


def unit(name: str) -> ConfigParser:
    found = ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(FOLDER / f"triptych-{name}.service")
    return found


@pytest.fixture(params=CONFIGURATIONS)
def started(request: pytest.FixtureRequest) -> tuple[ConfigParser, ProxySettings | EngineSettings]:
    """A unit, and the settings it comes to with a configuration of ours."""
    found = unit(CONFIGURATIONS[request.param])
    program, *command = shlex.split(found["Service"]["ExecStart"].replace("%i", request.param))
    assert program == "/opt/triptych/bin/triptych"
    at = command.index("--config") + 1
    assert command[at] == f"/etc/triptych/{request.param}.yaml"
    command[at] = str(FOLDER / f"{request.param}.yaml")
    return found, settings_of(command)


def test_every_file_is_looked_at() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == CONFIGURATIONS.keys()
    assert {file.stem for file in FOLDER.glob("*.service")} == {f"triptych-{name}" for name in CONFIGURATIONS.values()}


def test_systemd_waits_longer_than_the_process_does(
    started: tuple[ConfigParser, ProxySettings | EngineSettings],
) -> None:
    found, settings = started
    wait = settings.grace if isinstance(settings, EngineSettings) else settings.drain_delay + settings.grace_timeout
    assert int(found["Service"]["TimeoutStopSec"]) >= wait + 10


def test_it_runs_as_the_user_that_is_made(started: tuple[ConfigParser, ProxySettings | EngineSettings]) -> None:
    kind, name, *_ = shlex.split((FOLDER / "sysusers.conf").read_text(), comments=True)
    assert (kind, name) == ("u", started[0]["Service"]["User"])


def test_the_proxy_lists_the_engines_of_the_machine() -> None:
    proxy = settings_of(["proxy", "--config", str(FOLDER / "proxy.yaml")])
    assert isinstance(proxy, ProxySettings)
    engines = {
        name: settings_of([kind.removesuffix("@"), "--config", str(FOLDER / f"{name}.yaml")])
        for name, kind in CONFIGURATIONS.items()
        if name != "proxy"
    }
    there = {f"http://127.0.0.1:{engine.port}": getattr(engine, "role", "encode") for engine in engines.values()}
    assert {endpoint.url: role.label for role, endpoint in proxy.fleet()} == there
