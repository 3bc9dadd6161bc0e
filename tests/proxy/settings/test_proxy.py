"""All flags together."""

from __future__ import annotations

import pytest
from pydantic_settings import BaseSettings

from proxy.settings import ProxySettings
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


def test_no_subject_hides_what_another_checks() -> None:
    """The classes are one by inheritance: a validator of the same name would take the other's place, silently."""
    groups = [base for base in ProxySettings.__bases__ if base is not BaseSettings]
    names = [name for group in groups for name in vars(group)]
    private = [name for name in names if name.startswith("_") and not name.startswith(("__", "_abc"))]
    assert sorted(private) == sorted(set(private))
    fields = [name for group in groups for name in vars(group).get("__annotations__", {})]
    assert len(fields) == len(set(fields)) == len(ProxySettings.model_fields)
