"""`python -m engines.encoder --model DIR`: the encoder as a process."""

from __future__ import annotations

import sys

from engines.serve import Build, serve
from engines.settings import EncoderSettings


def main(argv: list[str] | None = None, *, prog: str = "triptych encoder") -> None:
    serve(EncoderSettings, _find, prog=prog, argv=argv)


def _find(settings: EncoderSettings) -> Build[EncoderSettings]:
    from engines.encoder.app import build

    return build


if __name__ == "__main__":
    main(sys.argv[1:])
