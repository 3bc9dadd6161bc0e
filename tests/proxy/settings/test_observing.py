"""Flags about looking on."""

from __future__ import annotations

import pytest

from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


def test_requests_are_logged_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).log_level == "info"
    assert "--log-level: Input should be 'debug', 'info'" in refused([*D, "--log-level", "loud"], capsys)
