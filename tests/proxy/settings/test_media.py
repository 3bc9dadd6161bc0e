"""Flags about what clients send."""

from __future__ import annotations

import pytest

from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--measure-urls", "yes"], "--measure-urls: Input should be 'never', 'public' or 'all'"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
