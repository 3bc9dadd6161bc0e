"""`python -m engines.language --model DIR --role both|prefill|decode`: a language engine as a process."""

from __future__ import annotations

import sys

from engines.language.build import build
from engines.serve import serve
from engines.settings import LanguageSettings


def main(argv: list[str] | None = None, *, prog: str = "triptych language") -> None:
    serve(LanguageSettings, build, prog=prog, argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
