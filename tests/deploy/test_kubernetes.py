"""The manifests by Kubernetes' own schemas, and what of them must agree.

tests/operations/test_manifests.py has the overlays put together and looks at the whole.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from engines.settings import EngineSettings
from proxy.settings import ProxySettings
from tests.fakes.deployment import deployment
from tests.fakes.media import chat, image, part
from tests.fakes.native import Encoder, Language
from tests.support.api_server import NAMESPACE, api_server, endpoints
from tests.support.command import command, ready
from tests.support.kubernetes import Document, check, container, selects, started

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
KUSTOMIZATIONS = sorted(FOLDER.rglob("kustomization.yaml"))
OVERLAYS = sorted(file.parent for file in FOLDER.glob("overlays/*/proxy.yaml"))
ROLES = {"encoder": "encode", "prefill": "prefill", "decode": "decode", "language": "both"}


def documents(folder: str) -> list[Document]:
    listed = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]
    return [each for name in listed for each in yaml.safe_load_all((FOLDER / folder / name).read_text())]


def of(kind: str, folder: str) -> list[Document]:
    return [document for document in documents(folder) if document["kind"] == kind]


def the(kind: str, folder: str) -> Document:
    (found,) = of(kind, folder)
    return found


def proxy(overlay: Path) -> ProxySettings:
    settings = started(the("Deployment", "proxy"), str(overlay / "proxy.yaml"))
    assert isinstance(settings, ProxySettings)
    return settings


@pytest.mark.parametrize("folder", ["proxy", "engine"])
def test_kubernetes_takes_them(folder: str) -> None:
    check(documents(folder))


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda file: str(file.parent.relative_to(FOLDER)))
def test_what_a_kustomization_names_is_there_and_nothing_beside_it_is_forgotten(file: Path) -> None:
    said = yaml.safe_load(file.read_text())
    named = {*said.get("resources", ()), *said.get("components", ())}
    generated = {name for entry in said.get("configMapGenerator", ()) for name in entry["files"]}
    assert all((file.parent / name).exists() for name in named | generated)
    assert {beside.name for beside in file.parent.glob("*.yaml")} == {
        file.name,
        *(name for name in named | generated if name.endswith(".yaml")),
    }


@pytest.mark.parametrize("folder", ["proxy", "engine"])
def test_a_service_of_the_same_name_cannot_speak_into_the_settings(folder: str) -> None:
    """Kubernetes sets TRIPTYCH_PORT=tcp://… in every pod beside a Service called triptych, unless told not to."""
    assert the("Deployment", folder)["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("folder", ["proxy", "engine"])
def test_selectors_find_the_pods(folder: str) -> None:
    deployment = the("Deployment", folder)
    selectors = [service["spec"]["selector"] for service in of("Service", folder)]
    selectors += [the("PodDisruptionBudget", folder)["spec"]["selector"]["matchLabels"]]
    selectors += [deployment["spec"]["selector"]["matchLabels"]]
    assert all(selects(labels, deployment) for labels in selectors)
    assert the("HorizontalPodAutoscaler", folder)["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "they would undo the autoscaler at each apply"


def test_policies_open_the_ports_that_there_are_to_the_pods_that_there_are() -> None:
    ports = {
        folder: {port["name"] for port in container(the("Deployment", folder))["ports"]}
        for folder in ("proxy", "engine")
    }
    for policy in of("NetworkPolicy", "proxy"):
        (folder,) = [
            each for each in ports if selects(policy["spec"]["podSelector"]["matchLabels"], the("Deployment", each))
        ]
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
        assert opened == ports[folder]


def test_kubernetes_waits_longer_than_the_processes_do() -> None:
    pod = the("Deployment", "proxy")["spec"]["template"]["spec"]
    settings = proxy(OVERLAYS[0])
    assert settings.drain_delay >= 5
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_delay + settings.grace_timeout + 10

    pod = the("Deployment", "engine")["spec"]["template"]["spec"]
    engine = _engine("language")
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + engine.grace + 10


def test_a_pod_has_time_to_find_its_engines() -> None:
    probe = container(the("Deployment", "proxy"))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= proxy(OVERLAYS[0]).start_delay + 10


def test_probes_ask_where_the_process_listens() -> None:
    ports = {port["name"]: port["containerPort"] for port in container(the("Deployment", "proxy"))["ports"]}
    settings = proxy(OVERLAYS[0])
    assert ports == {"http": settings.port, "admin": settings.admin_port, "metaserver": settings.metaserver_port}
    probed = {
        name: probe["httpGet"] for name, probe in container(the("Deployment", "proxy")).items() if "Probe" in name
    }
    assert probed == {
        "startupProbe": {"path": "/health", "port": "http"},
        "readinessProbe": {"path": "/health", "port": "admin"},
        "livenessProbe": {"path": "/health", "port": "admin"},
    }
    (port,) = container(the("Deployment", "engine"))["ports"]
    assert port == {"name": "http", "containerPort": _engine("language").port}


def test_bodies_in_flight_fit_the_memory() -> None:
    settings = proxy(OVERLAYS[0])
    limit = int(container(the("Deployment", "proxy"))["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    held = settings.max_bytes_in_flight + settings.workers * settings.media_cache_bytes
    assert held + settings.workers * (256 << 20) <= limit
    assert settings.workers == int(container(the("Deployment", "proxy"))["resources"]["requests"]["cpu"])


def test_the_proxy_may_watch_endpoint_slices_and_nothing_else() -> None:
    assert the("Role", "proxy")["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    account = the("ServiceAccount", "proxy")["metadata"]["name"]
    assert the("RoleBinding", "proxy")["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert the("Deployment", "proxy")["spec"]["template"]["spec"]["serviceAccountName"] == account


@pytest.mark.parametrize("role", ROLES)
def test_each_role_starts_what_it_is_called(role: str) -> None:
    assert getattr(_engine(role), "role", "encode") == ROLES[role]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_serves_the_roles_that_it_has(overlay: Path) -> None:
    said = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    components = {Path(name).name for name in said["resources"]} - {"proxy"}
    (service,) = of("Service", "engine")
    asked = {}
    for role, endpoint in proxy(overlay).fleet():
        assert (endpoint.finder, endpoint.url) == ("k8s", f"http://{said['namespace']}")
        assert endpoint.asked["port"] in {port["name"] for port in service["spec"]["ports"]}
        asked[endpoint.asked["selector"].removeprefix("app.kubernetes.io/component=")] = role.label
    assert asked == {component: ROLES[component] for component in components}


def _engine(role: str) -> EngineSettings:
    """What the role's patch makes of an engine."""
    said: Any = yaml.safe_load((FOLDER / role / "kustomization.yaml").read_text())
    (operation,) = yaml.safe_load(said["patches"][0]["patch"])
    deployment = the("Deployment", "engine")
    assert operation["path"] == "/spec/template/spec/containers/0/args"
    deployment["spec"]["template"]["spec"]["containers"][0]["args"] = operation["value"]
    settings = started(deployment)
    assert isinstance(settings, EngineSettings)
    return settings


async def test_what_the_autoscalers_adapter_adds_up_is_what_a_proxy_tells() -> None:
    rules = yaml.safe_load((FOLDER / "monitoring/adapter.yaml").read_text())["externalRules"]
    async with deployment("1e1p1d") as d:
        lines = (await d.get("/metrics")).body.decode().splitlines()
    told = {(match[1], match[2]) for line in lines if (match := re.match(r'(\w+)\{.*role="(\w+)"', line))}
    for role in ("encoder", "prefill", "decode", "language"):
        patch: Any = yaml.safe_load((FOLDER / role / "kustomization.yaml").read_text())["patches"][1]["patch"]
        name, label, _ = (operation["value"] for operation in yaml.safe_load(patch))
        (series,) = (r["seriesQuery"].partition("{")[0] for r in rules if r["name"]["as"] == name)
        assert label == ROLES[role]
        assert (series, label) in told


async def test_a_pod_finds_the_engines_of_its_overlay_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the arguments, the environment and the configuration of overlays/e-pd, before a scripted API server."""
    config = (FOLDER / "overlays/e-pd/proxy.yaml").read_text().replace("k8s+http://triptych", f"k8s+http://{NAMESPACE}")
    (tmp_path / "proxy.yaml").write_text(config)
    pod = container(the("Deployment", "proxy"))
    args = [str(tmp_path / "proxy.yaml") if arg == "/etc/triptych/proxy.yaml" else arg for arg in pod["args"][1:]]
    for entry in pod["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    async with contextlib.AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(Encoder())
        language = await stack.enter_async_context(Language())
        api = await stack.enter_async_context(api_server())
        for name, engine in (("encoder", encoder), ("language", language)):
            ports = [{"name": "http", "port": engine.port}]
            labels = f"app.kubernetes.io/component={name}"
            api.put(f"triptych-{name}-x7k2p", *endpoints("127.0.0.1"), labels=labels, ports=ports)
        monkeypatch.setenv("TRIPTYCH_KUBERNETES_API", api.url)
        monkeypatch.setenv("TRIPTYCH_KUBERNETES_CREDENTIALS", str(tmp_path / "account"))
        monkeypatch.setenv("TRIPTYCH_DRAIN_DELAY", "0")
        http = await stack.enter_async_context(aiohttp.ClientSession())
        flags = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--metaserver-port", "0")
        process, line = await stack.enter_async_context(command(*args, *flags))
        url = line.split()[1]
        await ready(http, url)
        async with http.post(f"{url}/v1/chat/completions", json=chat(part(image()))) as answer:
            assert answer.status == 200
            assert answer.headers["x-triptych-route"].startswith(
                f"E-PD; encode={encoder.netloc}; both={language.netloc}"
            )
        process.terminate()
