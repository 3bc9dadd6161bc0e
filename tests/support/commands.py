"""The command lines that manifests and examples hold, read by the settings that would read them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from unittest import mock

from engines.settings import EncoderSettings, EngineSettings, LanguageSettings
from engines.settings import load as load_engine
from proxy.settings import ProxySettings
from proxy.settings import load as load_proxy

ENGINES: dict[str, type[EngineSettings]] = {"encoder": EncoderSettings, "language": LanguageSettings}


def settings_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> ProxySettings | EngineSettings:
    """What `triptych COMMAND` would be told with nothing else in the environment. Raises what it would end with."""
    name, *arguments = command
    with mock.patch.dict(os.environ, environment or {}, clear=True):
        if name == "proxy":
            return load_proxy(arguments)
        return load_engine(ENGINES[name], arguments, prog=f"triptych {name}")
