"""`python -m engines.language --model DIR --role both|prefill|decode`: a language engine as a process, with --encode an
encoder beside it."""

from __future__ import annotations

import sys

from engines.serve import Build, serve
from engines.settings import ColocatedSettings


def main(argv: list[str] | None = None, *, prog: str = "triptych language") -> None:
    serve(ColocatedSettings, _find, prog=prog, argv=argv)


def _find(settings: ColocatedSettings) -> Build[ColocatedSettings]:
    if settings.encode:
        from engines.colocated.build import build as build_both

        return build_both
    from engines.language.build import build

    return build


if __name__ == "__main__":
    main(sys.argv[1:])
