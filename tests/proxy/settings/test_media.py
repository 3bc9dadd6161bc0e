"""Flags about what clients send."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import PurePosixPath

import pytest

from proxy.media.addresses import Rules
from proxy.settings import load
from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--measure-urls", "yes"], "--measure-urls: Input should be 'never', 'public' or 'all'"),
        (["--media-urls", "yes"], "--media-urls: Input should be 'refuse', 'engines' or 'fetch'"),
        (["--media-schemes", "https,gopher"], "--media-schemes: no scheme 'gopher' (known: data, http, https, file)"),
        (["--media-hosts", "http://h"], "--media-hosts: 'http://h' is no host"),
        (["--media-networks", "10.0.0.1/8"], "--media-networks: 10.0.0.1/8 has host bits set"),
        (["--media-roots", "/data,more"], "--media-roots: more is no absolute path"),
        (["--max-json-depth", "201"], "--max-json-depth: Input should be less than or equal to 200"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused([*D, *argv], capsys)


def test_rules() -> None:
    assert load(D).media_rules() == Rules()
    flags = [*D, "--media-urls", "fetch", "--media-schemes", "HTTPS, file", "--media-hosts", "*.Example.com"]
    rules = load([*flags, "--media-networks", "10.0.0.0/8", "--media-roots", "/a,/b/"]).media_rules()
    roots = (PurePosixPath("/a"), PurePosixPath("/b"))
    assert rules == Rules("fetch", frozenset({"https", "file"}), ("*.example.com",), (ip_network("10.0.0.0/8"),), roots)
