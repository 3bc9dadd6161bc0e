"""`python -m engines.language --model DIR --role both|prefill|decode`: a language engine as a process, with --encode an
encoder beside it."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager

from engines.http import Engine
from engines.language.build import build
from engines.serve import serve
from engines.settings import ColocatedSettings


def main(argv: list[str] | None = None, *, prog: str = "triptych language") -> None:
    serve(ColocatedSettings, _build, prog=prog, argv=argv)


def _build(settings: ColocatedSettings) -> AbstractAsyncContextManager[Engine]:
    if not settings.encode:
        return build(settings)
    from engines.colocated.build import build as build_both  # what only encoders need takes long to import

    return build_both(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
