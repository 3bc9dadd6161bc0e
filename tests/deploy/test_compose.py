"""Every service of the compose files starts what our settings accept, and the proxies find the engines beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from engines.settings import EngineSettings
from proxy.settings import ProxySettings
from tests.support.commands import settings_of

FOLDER = Path(__file__).parents[2] / "deploy/compose"
COMMON = FOLDER / "common.yaml"
FILES = sorted(file for file in FOLDER.glob("*.yaml") if file != COMMON)
IMAGES = {"triptych-proxy": "proxy", "triptych-engines": "engines"}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def services(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Those of ours, as `docker compose config` would show them with nothing else set."""
    common, own = (_read(file)["services"] for file in (COMMON, request.param))
    return {
        name: _extended(common[service["extends"]["service"]], service)
        for name, service in own.items()
        if "extends" in service
    }


def _read(file: Path) -> Any:
    """With the defaults of its variables."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", file.read_text()))


def _extended(template: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {**template, **own, "environment": template["environment"] | own["environment"]}


def _settings(service: dict[str, Any]) -> ProxySettings | EngineSettings:
    image = IMAGES[service["image"].partition(":")[0]]
    file = FOLDER.parent / "docker" / f"{image}.Dockerfile"
    told = dict(re.findall(r"(TRIPTYCH_\w+)=(\S+)", file.read_text()))
    command = service.get("command") or json.loads(re.findall(r"^CMD (.*)$", file.read_text(), re.MULTILINE)[0])
    return settings_of(command, told | service["environment"])


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_there_is_one_for_each_topology() -> None:
    assert [file.stem for file in FILES] == ["e-p-d", "e-pd", "p-d", "pd", "site"]


def test_proxies_list_exactly_the_engines_that_are_there(services: dict[str, dict[str, Any]]) -> None:
    found = {name: _settings(service) for name, service in services.items()}
    engines = {name: settings for name, settings in found.items() if isinstance(settings, EngineSettings)}
    proxies = [settings for settings in found.values() if isinstance(settings, ProxySettings)]
    there = {(name, settings.port): getattr(settings, "role", "encode") for name, settings in engines.items()}
    assert proxies
    for proxy in proxies:
        listed = {urlsplit(endpoint.url).netloc: role.label for role, endpoint in proxy.fleet()}
        assert listed == {f"{name}:{port}": role for (name, port), role in there.items()}


def test_engines_reach_each_other_by_the_name_they_tell(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        settings = _settings(service)
        if isinstance(settings, EngineSettings):
            assert settings.transfer_host == name
            assert settings.host == "0.0.0.0"


def test_no_two_engines_share_a_gpu(services: dict[str, dict[str, Any]]) -> None:
    reserved = [
        service["deploy"]["resources"]["reservations"]["devices"]
        for service in services.values()
        if "deploy" in service
    ]
    numbers = [number for devices in reserved for device in devices for number in device["device_ids"]]
    assert len(numbers) == len(set(numbers)) == sum("DEVICE" in str(service) for service in services.values())


def test_docker_waits_longer_than_the_process_does(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        settings = _settings(service)
        grace = settings.grace if isinstance(settings, EngineSettings) else settings.grace_timeout
        assert _seconds(service["stop_grace_period"]) >= grace + 5


def test_nothing_has_rights_that_it_does_not_need(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith(("127.0.0.1:", "0.0.0.0:8000:")) for port in service.get("ports", ()))


def test_the_site_watches_the_proxies_that_it_has() -> None:
    watched = _read(FOLDER / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    site = _read(FOLDER / "site.yaml")
    port = _read(COMMON)["services"]["proxy"]["environment"]["TRIPTYCH_ADMIN_PORT"]
    assert watched == [f"{name}:{port}" for name in site["services"] if name.startswith("proxy-")]
    fronted = re.findall(r"server (\S+):8000", (FOLDER.parent / "nginx/triptych.conf").read_text())
    assert fronted == [name for name in site["services"] if name.startswith("proxy-")]
    mounted = [volume.split(":")[0] for service in site["services"].values() for volume in service.get("volumes", ())]
    assert all((FOLDER / path).exists() for path in mounted if path.startswith("."))
