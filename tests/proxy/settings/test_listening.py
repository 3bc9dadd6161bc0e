"""Flags about the process."""

from __future__ import annotations

import pytest

from tests.support.settings import load, refused

D = ["--decode-servers-urls", "http://d:1"]


def test_there_is_one_worker_unless_more_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(*D).workers == 1
    assert load(*D, "--workers", "4").workers == 4
    with pytest.raises(SystemExit):
        load(*D, "--workers", "0")
    assert "--workers: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*D, "--port", "70000"], "--port: Input should be less than or equal to 65535"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(argv, capsys)
