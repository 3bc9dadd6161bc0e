"""Settings of a command line, and what a person reads where they are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from proxy import settings
from proxy.settings import ProxySettings


def load(*argv: str) -> ProxySettings:
    return settings.load([*argv])


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of wrong flags, with the exit status of wrong usage."""
    with pytest.raises(SystemExit) as caught:
        settings.load(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err
