"""The manifests as the programs that would read them do: docker-compose, kubectl and systemd, without their daemons."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from proxy.core import ROLES
from proxy.settings import ProxySettings
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
