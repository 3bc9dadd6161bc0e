"""All flags together."""

from __future__ import annotations

import pytest

from tests.support.settings import refused

D = ["--decode-servers-urls", "http://d:1"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--virtual-encoder-port", "0", "--workers", "2"], "must meet in one process"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
