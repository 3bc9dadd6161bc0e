import pytest

from deploy import system_libraries


def test_a_library_that_is_not_there_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_libraries, "PACKAGES", {"libc.so.6": "libc6", "libnowhere.so.1": "libnowhere1"})
    assert system_libraries.missing_packages() == ["libnowhere1"]
