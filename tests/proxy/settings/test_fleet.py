"""Flags about engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.core import BOTH, Role
from proxy.settings import Endpoint
from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


def test_lists_become_a_fleet_with_roles() -> None:
    found = load(
        *("--encode-servers-urls", "http://e:1, http://e:2/"),
        *("--prefill-servers-urls", "native+http://p:1"),
        *("--decode-servers-urls", "http://d:1"),
    )
    assert found.fleet() == [
        (Role.ENCODE, Endpoint("http://e:1", "auto")),
        (Role.ENCODE, Endpoint("http://e:2", "auto")),
        (Role.PREFILL, Endpoint("http://p:1", "native")),
        (Role.DECODE, Endpoint("http://d:1", "auto")),
    ]


@pytest.mark.parametrize("nothing", ["disable", "none", "", "NONE", " "])
def test_without_prefill_the_decode_list_is_combined(nothing: str) -> None:
    assert load("--prefill-servers-urls", nothing, *D).fleet() == [(BOTH, Endpoint("http://d:1", "auto"))]


def test_lists_of_encoders_are_urls_without_their_ends() -> None:
    flags = ["--virtual-encoder-port", "0", "--encoder-register-urls", "http://l:8997/, http://m:8997"]
    assert load(*D, *flags).lists() == ["http://l:8997", "http://m:8997"]
    assert load(*D).lists() == []


def test_a_file_may_list_urls_and_mappings(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("decode-servers-urls:\n- http://d:1\n- {url: 'http://d:2', weight: 3, labels: {rack: r1}}\n")
    assert load("--config", str(file)).fleet() == [
        (BOTH, Endpoint("http://d:1", "auto")),
        (BOTH, Endpoint("http://d:2", "auto", {"labels": {"rack": "r1"}}, 3.0)),
    ]


def test_lists_may_be_empty_where_engines_register_themselves() -> None:
    assert load("--register-key", "k").fleet() == []


def test_names_behind_which_there_are_engines_stand_in_the_same_lists() -> None:
    ((role, found),) = load("--decode-servers-urls", "srv+http://_d._tcp.x").fleet()
    assert (role, found.finder, found.name) == (BOTH, "srv", "srv+http://_d._tcp.x")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--decode-servers-urls: at least one engine is needed"),
        (["--prefill-servers-urls", "http://p:1"], "--decode-servers-urls: at least one engine is needed"),
        ([*D, "--encode-servers-urls", "http://d:1/"], "http://d:1 is listed twice"),
        (["--decode-servers-urls", "dns+http://d:1,dns+http://d:1/"], "dns+http://d:1 is listed twice"),
        ([*D, "--encoder-register-urls", "http://l:8997"], "listens on --virtual-encoder-port"),
        ([*D, "--virtual-encoder-port", "0", "--encoder-register-urls", "l:8997"], "looks like http://host:port"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
