"""The manifests as the programs that would read them do: docker-compose, kubectl and systemd, without their daemons."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
import yaml

from proxy.core import ROLES
from proxy.settings import ProxySettings
from tests.fakes.media import chat, image
from tests.fakes.media import part as image_part
from tests.fakes.native import Encoder, Language
from tests.support.command import ready
from tests.support.kubernetes import Document, check, container, selects, started

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = sorted((DEPLOY / "kubernetes/overlays").iterdir())
MONITORING = DEPLOY / "kubernetes/monitoring"
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


@pytest.fixture(params=OVERLAYS, ids=lambda folder: folder.name)
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    """All that it would apply."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl puts overlays together; Debian 12 has none that knows components")
    return list(yaml.safe_load_all(said(kubectl, "kustomize", request.param)))


def of(kind: str, documents: list[Document]) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def test_kubernetes_takes_an_overlay(overlay: list[Document]) -> None:
    check(overlay)
    assert {document["metadata"].get("namespace", "triptych") for document in overlay} == {"triptych"}


def test_whatever_is_named_in_an_overlay_is_there(overlay: list[Document]) -> None:
    deployments = {deployment["metadata"]["name"]: deployment for deployment in of("Deployment", overlay)}
    for scaler in of("HorizontalPodAutoscaler", overlay):
        assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
    for budget in of("PodDisruptionBudget", overlay):
        labels = budget["spec"]["selector"]["matchLabels"]
        assert sum(selects(labels, deployment) for deployment in deployments.values()) == 1
    for policy in of("NetworkPolicy", overlay):
        labels = policy["spec"]["podSelector"]["matchLabels"]
        assert any(selects(labels, deployment) for deployment in deployments.values())


def test_the_proxies_of_an_overlay_find_its_engines(overlay: list[Document], tmp_path: Path) -> None:
    (config,) = of("ConfigMap", overlay)
    (tmp_path / "proxy.yaml").write_text(config["data"]["proxy.yaml"])
    deployments = {deployment["metadata"]["name"]: deployment for deployment in of("Deployment", overlay)}
    proxy = started(deployments.pop("triptych-proxy"), str(tmp_path / "proxy.yaml"))
    assert isinstance(proxy, ProxySettings)
    found = set()
    for _, endpoint in proxy.fleet():
        name, _, value = endpoint.asked["selector"].partition("=")
        (service,) = [s for s in of("Service", overlay) if s["metadata"]["labels"].get(name) == value]
        behind = [each for each in deployments if selects(service["spec"]["selector"], deployments[each])]
        assert len(behind) == 1
        found.update(behind)
    assert found == deployments.keys()


def test_the_autoscalers_of_an_overlay_ask_for_metrics_that_the_adapter_makes(overlay: list[Document]) -> None:
    rules = yaml.safe_load((MONITORING / "adapter.yaml").read_text())["externalRules"]
    made = {rule["name"]["as"] for rule in rules}
    asked = [
        metric["external"]["metric"]
        for s in of("HorizontalPodAutoscaler", overlay)
        for metric in s["spec"]["metrics"]
        if "external" in metric
    ]
    assert len(asked) == len(of("Deployment", overlay)) - 1
    roles = {role.label for role in ROLES}
    assert all(metric["name"] in made and metric["selector"]["matchLabels"]["role"] in roles for metric in asked)


def test_prometheus_takes_the_scrape_configuration_and_the_adapter_s_queries(
    part: Callable[[str], str], tmp_path: Path
) -> None:
    said(part("promtool"), "check", "config", "--syntax-only", MONITORING / "scrape.yaml")
    rules = yaml.safe_load((MONITORING / "adapter.yaml").read_text())["externalRules"]
    queries = [_asked(rule) for rule in rules]
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": recorded}]}))
    said(part("promtool"), "check", "rules", tmp_path / "rules.yml")


def _asked(rule: Document) -> str:
    """What the adapter asks Prometheus for one role."""
    series = rule["seriesQuery"].partition("{")[0]
    return str(rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.LabelMatchers>>", 'role="encode"'))


EXPOSURE = {"triptych-proxy.service": 20, "triptych-encoder@.service": 40, "triptych-language@.service": 40}
"""The most that systemd may think of a unit: 100 for a service with all rights."""


@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_takes_a_unit_and_finds_it_well_fenced(part: Callable[[str], str], tmp_path: Path, name: str) -> None:
    unit = tmp_path / name
    text = (DEPLOY / "systemd" / name).read_text()
    unit.write_text(text.replace("/opt/triptych/bin/triptych", "/bin/true"))  # it looks for the program
    said(part("systemd-analyze"), "verify", unit)
    said(part("systemd-analyze"), "security", "--offline=true", f"--threshold={EXPOSURE[name]}", unit)


def test_probes_speak_as_the_proxy_listens(overlay: list[Document]) -> None:
    (deployment,) = [each for each in of("Deployment", overlay) if each["metadata"]["name"] == "triptych-proxy"]
    one = container(deployment)
    encrypted = any(entry["name"] == "TRIPTYCH_TLS_CERT" for entry in one["env"])
    schemes = {probe["httpGet"].get("scheme", "HTTP") for name, probe in one.items() if name.endswith("Probe")}
    assert schemes == {"HTTPS" if encrypted else "HTTP"}
    mounted = tuple(mount["mountPath"] + "/" for mount in one["volumeMounts"])
    named = [entry["value"] for entry in one["env"] if entry.get("value", "").startswith("/")]
    assert all(path.startswith(mounted) for path in named)


def test_proxies_show_the_key_that_engines_ask_for(overlay: list[Document]) -> None:
    told = {}
    for deployment in of("Deployment", overlay):
        for entry in container(deployment)["env"]:
            if entry["name"] in ("TRIPTYCH_ENGINE_KEY", "TRIPTYCH_KEY"):
                told[deployment["metadata"]["name"]] = entry["valueFrom"]["secretKeyRef"]
    assert not told or told.keys() == {each["metadata"]["name"] for each in of("Deployment", overlay)}
    assert len({str(reference) for reference in told.values()}) <= 1


def _calls(of: str) -> set[str]:
    """The system calls of one of systemd's sets."""
    found: set[str] = set()
    for line in map(str.strip, said("systemd-analyze", "syscall-filter", of).splitlines()[1:]):
        if not line.startswith("#"):
            found |= _calls(line) if line.startswith("@") else {line}
    return found


async def test_what_the_unit_forbids_is_nothing_that_the_proxy_does(part: Callable[[str], str], tmp_path: Path) -> None:
    filters = re.findall(
        r"^SystemCallFilter=(.*)$", (DEPLOY / "systemd/triptych-proxy.service").read_text(), re.MULTILINE
    )
    allowed: set[str] = set()
    for line in filters:
        calls = {call for name in line.removeprefix("~").split() for call in _calls(name)}
        allowed = allowed - calls if line.startswith("~") else allowed | calls

    trace = tmp_path / "trace"
    proxy = (
        sys.executable,
        "-m",
        "proxy",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--workers",
        "2",
        "--log-level",
        "error",
    )
    async with Encoder() as encoder, Language() as language:
        urls = ("--encode-servers-urls", encoder.url, "--decode-servers-urls", language.url)
        strace = (part("strace"), "-f", "-qq", "-o", str(trace))
        process = await asyncio.create_subprocess_exec(*strace, *proxy, *urls, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            url = (await process.stdout.readline()).decode().split()[1]
            await ready(http, url)
            async with http.post(f"{url}/v1/chat/completions", json=chat(image_part(image()))) as answer:
                assert answer.status == 200
                await answer.read()
            (supervisor,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(supervisor), signal.SIGHUP)
            os.kill(int(supervisor), signal.SIGTERM)
            assert await process.wait() == 0
    made = trace.read_text()
    used = set(re.findall(r"^\d+ +([a-z]\w+)\(", made, re.MULTILINE))
    assert "openat" in used
    assert used - allowed <= {"mbind"}, "numpy says where memory should be; a no is taken well"
    assert not re.search(r"PROT_WRITE\|PROT_EXEC", made), "MemoryDenyWriteExecute"
