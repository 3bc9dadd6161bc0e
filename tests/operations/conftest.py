"""Tests against the real parts that stand around a proxy: `make operations` installs them and runs these."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_WANTED = os.environ.get("TRIPTYCH_PARTS") == "required"
_PLACES = "/usr/sbin:/usr/local/sbin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _WANTED:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs real parts: make operations installs them"))


@pytest.fixture(scope="session")
def part() -> Callable[[str], str]:
    """The path of a program, such as nginx; a test without it fails."""

    def find(name: str) -> str:
        path = shutil.which(name) or shutil.which(name, path=_PLACES)
        assert path is not None, f"{name} is not installed: make operations does it"
        return path

    return find
