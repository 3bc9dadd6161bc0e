"""Flags about time."""

from __future__ import annotations

import pytest

from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--encode-timeout", "0"], "--encode-timeout: Input should be greater than 0"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
