"""The one reader of flags, environment and YAML. Everything else gets values, frozen.

Precedence: flags, then TRIPTYCH_… in the environment, then the file of --config, then the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, EnvSettingsSource, SettingsConfigDict, SettingsError

from proxy.settings.proxy import ProxySettings


def load(argv: Sequence[str]) -> ProxySettings:
    """The settings of a command line. Exits with a message for a person when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="triptych proxy", description=ProxySettings.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli = CliSettingsSource[Any](ProxySettings, root_parser=parser)
    given = cli(args=list(argv))()
    config = given.get("config") or EnvSettingsSource(ProxySettings)().get("config")
    try:
        return _configured(config)(**given)
    except ValidationError as error:
        lines = [_explained(e["loc"], e["msg"]) for e in error.errors()]
    except (yaml.YAMLError, SettingsError, OSError, ValueError) as error:
        lines = [f"--config: {error}"]
    return parser.exit(2, "".join(f"triptych proxy: {line}\n" for line in lines))


def _configured(config: str | None) -> type[ProxySettings]:
    if config is not None and not Path(config).is_file():
        raise FileNotFoundError(f"there is no file {config}")

    class Configured(ProxySettings):
        model_config = SettingsConfigDict(yaml_file=config)

    return Configured


def _explained(where: Sequence[Any], message: str) -> str:
    flag = "--" + str(where[0]).replace("_", "-") + ": " if where else ""
    return flag + message.removeprefix("Value error, ")
