"""Flags about looking on."""

from __future__ import annotations

import pytest

from proxy.settings import observing
from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


def test_requests_are_logged_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).log_level == "info"
    assert "--log-level: Input should be 'debug', 'info'" in refused([*D, "--log-level", "loud"], capsys)


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ([], "console"),
        (["--log-level", "warning"], "off"),
        (["--access-log", "json", "--log-level", "error"], "json"),
        (["--access-log", "off"], "off"),
    ],
)
def test_the_access_log_goes_with_the_log_unless_asked_for(flags: list[str], form: str) -> None:
    assert load(*D, *flags).access_form() == form


def test_receipts_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).receipts == 256
    assert load(*D, "--receipts", "0").receipts == 0
    assert "--receipts: Input should be greater" in refused([*D, "--receipts", "-1"], capsys)


def test_traces_go_to_a_collector_only_if_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).otlp_endpoint is None
    given = load(*D, "--otlp-endpoint", "http://collector:4318", "--trace-sample", "1")
    assert (given.otlp_endpoint, given.trace_sample) == ("http://collector:4318", 1.0)
    assert "'collector:4318' is no http:// or https:// URL" in refused(
        [*D, "--otlp-endpoint", "collector:4318"], capsys
    )
    assert "--trace-sample" in refused([*D, "--trace-sample", "2"], capsys)


def test_a_collector_without_the_extra_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observing, "find_spec", lambda name: None)
    assert "pip install 'triptych[tracing]'" in refused([*D, "--otlp-endpoint", "http://c:4318"], capsys)
