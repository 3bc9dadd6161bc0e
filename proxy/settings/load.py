"""The one reader of flags, environment and YAML. Everything else gets values, frozen.

Precedence: flags, then TRIPTYCH_… in the environment, then the file of --config, then the defaults.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, EnvSettingsSource, SettingsError

from proxy.settings.document import Document, Unreadable
from proxy.settings.proxy import ProxySettings

_FLAG = re.compile(r"--([a-z][a-z-]*): (.*)", re.DOTALL)
_NO_DEFAULT = re.compile(r" \(default: (None)?\)$")
_EPILOG = """\
Every flag is also a variable (--max-queue is TRIPTYCH_MAX_QUEUE) and a key of the YAML file that --config names. A flag
comes before the variable, that before the file. `triptych check` with the same flags says what would fail.
"""
_PREFIX = ProxySettings.model_config["env_prefix"]


class Wrong(ValueError):
    """Settings that cannot be used. Each of `lines` says what is wrong and where it was said: a flag, a variable, or
    the file and its line."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Sources:
    """What a process was started with. The file may say something else each time it is read."""

    flags: Mapping[str, Any]
    environment: Mapping[str, Any]
    file: Path | None

    @classmethod
    def of(cls, argv: Sequence[str], prog: str = "triptych proxy", about: str = "") -> Sources:
        """Of a command line. Exits with a message for a person when it is none, and for --help, which begins with what
        the program is about."""
        parser, source = _parser(prog, about or inspect.cleandoc(ProxySettings.__doc__ or ""))
        flags = source(args=list(argv))()
        try:
            environment = EnvSettingsSource(ProxySettings)()
        except SettingsError as error:
            parser.exit(2, f"{prog}: {error}\n")
        file = flags.get("config") or environment.get("config")
        return cls(flags, environment, None if file is None else Path(file))

    def read(self) -> ProxySettings:
        """The settings as things stand. Raises Wrong."""
        return self.settings(self.text())

    def text(self) -> str:
        """What the file says; empty without one. Raises Wrong."""
        if self.file is None:
            return ""
        try:
            return self.file.read_text("utf-8")
        except FileNotFoundError:
            raise Wrong([f"--config: there is no file {self.file}"]) from None
        except (OSError, UnicodeDecodeError) as error:
            raise Wrong([f"--config: {self.file} cannot be read: {error}"]) from None

    def settings(self, text: str) -> ProxySettings:
        """Those of a file with this text. Raises Wrong."""
        try:
            document = Document(text)
        except Unreadable as error:
            raise Wrong([f"{self.file}:{error.line}: {error}"]) from None
        values = {} if document.value is None else document.value
        if not isinstance(values, dict):
            raise Wrong([f"{self.file}:1: these are no settings: each line is one, like port: 8000"])
        said = {str(key).replace("-", "_"): value for key, value in values.items()}
        try:
            return ProxySettings(**{**said, **self.environment, **self.flags})
        except ValidationError as error:
            raise Wrong(
                [self._explained(document, said, e["type"], e["loc"], e["msg"]) for e in error.errors()]
            ) from None

    def _explained(
        self, document: Document, said: Mapping[str, Any], kind: str, where: Sequence[str | int], message: str
    ) -> str:
        message = message.removeprefix("Value error, ")
        if not where and (flag := _FLAG.fullmatch(message)):
            where, message = (flag[1].replace("-", "_"),), flag[2]
        if kind == "extra_forbidden":
            near = get_close_matches(str(where[0]), ProxySettings.model_fields, n=1)
            message = "there is no such setting" + (f": is it {near[0].replace('_', '-')}?" if near else "")
        name = str(where[0]) if where else ""
        flag_name = name.replace("_", "-")
        if not name:
            line = document.mention(message)
            return message if line is None else f"{self.file}:{line}: {message}"
        if name in self.flags or (name not in self.environment and name not in said):
            return f"--{flag_name}: {message}"
        if name in self.environment:
            return f"{_PREFIX}{name.upper()}: {message}"
        line = (len(where) == 1 and document.mention(message, where)) or document.line(where)
        return f"{self.file}:{line}: {flag_name}: {message}"


def load(argv: Sequence[str]) -> ProxySettings:
    """The settings of a command line. Exits with a message for a person when they are wrong."""
    try:
        return Sources.of(argv).read()
    except Wrong as error:
        refuse("triptych proxy", error)


def refuse(prog: str, error: Wrong) -> NoReturn:
    """Exit as wrong usage does."""
    sys.stderr.write("".join(f"{prog}: {line}\n" for line in error.lines))
    sys.exit(2)


def _parser(prog: str, about: str) -> tuple[argparse.ArgumentParser, CliSettingsSource[Any]]:
    """With the flags grouped by subject, as the settings are."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {
        name: group
        for subject in reversed(ProxySettings.__bases__)
        if "__doc__" in vars(subject) and BaseModel in subject.__bases__
        for group in [parser.add_argument_group(str(subject.__doc__))]
        for name in vars(subject)["__annotations__"]
    }

    def add(parser: argparse.ArgumentParser, *names: str, **how: Any) -> argparse.Action:
        group = groups.get(names[0].lstrip("-").replace("-", "_"), parser)
        how["help"] = _NO_DEFAULT.sub("", how["help"])
        return group.add_argument(*names, **how)

    return parser, CliSettingsSource[Any](ProxySettings, root_parser=parser, add_argument_method=add)
