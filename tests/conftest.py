"""Settings of all tests: the same examples in every run, and no verdict by time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from deploy import processes
from tests.support.nursery import Nursery

SLOW = Path(__file__).parent / "system"

settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Commands that a test runs in its own process may silence loggers for good; the next test reads what these say."""
    loggers = {name: logging.getLogger(name) for name in ("", "proxy", "engines")}
    levels = {name: logger.level for name, logger in loggers.items()}
    disabled = logging.root.manager.disable
    yield
    for name, logger in loggers.items():
        logger.setLevel(levels[name])
    logging.disable(disabled)


@pytest.fixture(scope="session", autouse=True)
def engines_in_a_moment() -> Iterator[None]:
    """Engines that tests start begin where the imports, which take seconds of all cores, have been done."""
    spawn, nursery = processes.spawn, Nursery(processes.spawn)
    processes.spawn = nursery.spawn
    yield
    processes.spawn = spawn
    nursery.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: SLOW not in item.path.parents)
