from __future__ import annotations

import pytest

from proxy.settings import ProxySettings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ProxySettings.model_fields:
        monkeypatch.delenv(f"TRIPTYCH_{name.upper()}", raising=False)
