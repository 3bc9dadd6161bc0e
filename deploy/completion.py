"""`triptych completion SHELL`: what a shell needs to complete commands and flags, on stdout. Each part keeps its flags.

A part's flags are known when it begins to read them: it is run up to there, and no further.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import shtab

_WHERE = {
    "bash": "triptych completion bash > ~/.local/share/bash-completion/completions/triptych",
    "zsh": "triptych completion zsh > ~/.zfunc/_triptych       (with ~/.zfunc in fpath, before compinit)",
    "tcsh": "triptych completion tcsh > ~/.triptych.completion.csh       (and source it)",
}


class Reading(Exception):
    """A part begins to read its flags."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def parser_of(module: str, command: str) -> argparse.ArgumentParser:
    """The parser of a part that `module` is run for as `triptych command`."""
    before = sys.argv
    sys.argv = [f"triptych {command}"]
    try:
        with _stopped_at_flags(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a module that is imported already
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except Reading as reading:
        return reading.parser
    finally:
        sys.argv = before
    raise LookupError(f"{module} reads no flags")


@contextmanager
def _stopped_at_flags() -> Iterator[None]:
    """Within, whoever has a `--help` and parses raises Reading. A parser without one only looks ahead for another."""
    parse = argparse.ArgumentParser.parse_known_args

    def stopped(parser: argparse.ArgumentParser, *arguments: Any, **named: Any) -> Any:
        if "-h, --help" in parser.format_help():
            raise Reading(parser)
        return parse(parser, *arguments, **named)

    argparse.ArgumentParser.parse_known_args = stopped  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]


def script(shell: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """For `commands`, each a module and what it is for."""
    root = argparse.ArgumentParser(prog="triptych")
    root.add_argument("--version", action="store_true", help="print the version")
    parts = root.add_subparsers()
    for command, (module, text) in commands.items():
        known = parser_of(module, command)
        parts.add_parser(command, parents=[known], add_help=False, conflict_handler="resolve", help=text)
    parts.add_parser("completion", parents=[_parser()], add_help=False, help="what a shell needs to complete these")
    return str(shtab.complete(root, shell=shell))


def main(argv: Sequence[str], commands: Mapping[str, tuple[str, str]]) -> NoReturn:
    arguments = _parser().parse_args(argv)
    print(script(arguments.shell, commands))
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triptych completion",
        description="Print what a shell needs to complete commands and flags.",
        epilog="\n".join(_WHERE.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=list(_WHERE))
    return parser
