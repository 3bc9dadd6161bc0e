"""What the configurations of nginx and Envoy share with the proxy's defaults; tests/operations has both of them run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.http.server import Limits
from proxy.settings import ProxySettings
from tests.support.settings import load

DEPLOY = Path(__file__).parents[2] / "deploy"
NGINX = (DEPLOY / "nginx/triptych.conf").read_text()
ENVOY = yaml.safe_load((DEPLOY / "envoy/envoy.yaml").read_text())["static_resources"]


@pytest.fixture
def defaults() -> ProxySettings:
    return load("--decode-servers-urls", "http://pd:8002")


def _nginx(directive: str) -> str:
    (found,) = re.findall(rf"^\s*{directive} ([^;]+);", NGINX, re.MULTILINE)
    return str(found)


def _envoy() -> tuple[dict[str, Any], dict[str, Any]]:
    """What it does for clients, and towards proxies."""
    manager = ENVOY["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager, ENVOY["clusters"][0]


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_a_front_is_the_more_patient_one(defaults: ProxySettings) -> None:
    longest = defaults.encode_timeout + defaults.prefill_timeout + defaults.answer_timeout + defaults.queue_timeout
    manager, _ = _envoy()
    assert _seconds(_nginx("proxy_read_timeout")) > longest
    assert _seconds(manager["stream_idle_timeout"]) > longest


def test_a_front_lets_go_of_idle_connections_before_the_proxy_does() -> None:
    """nginx does after 60 s, unless told otherwise."""
    _, cluster = _envoy()
    (options,) = cluster["typed_extension_protocol_options"].values()
    assert "keepalive_timeout" not in NGINX
    assert _seconds(options["common_http_protocol_options"]["idle_timeout"]) <= 60 < Limits().idle_seconds


def test_what_the_proxy_takes_passes_a_front(defaults: ProxySettings) -> None:
    assert int(_nginx("client_max_body_size").partition("m")[0]) << 20 == defaults.max_body_bytes


def test_fronts_ask_the_same_two_proxies_on_their_port(defaults: ProxySettings) -> None:
    _, cluster = _envoy()
    addresses = [
        e["endpoint"]["address"]["socket_address"] for e in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    asked = [f"{address['address']}:{address['port_value']}" for address in addresses]
    assert asked == re.findall(r"server (\S+) max_fails", NGINX) == [f"proxy-{n}:{defaults.port}" for n in (1, 2)]
