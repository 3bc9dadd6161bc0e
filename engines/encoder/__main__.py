"""`python -m engines.encoder --model DIR`: the encoder as a process."""

from __future__ import annotations

import sys

from engines.encoder.app import build
from engines.serve import serve
from engines.settings import EncoderSettings


def main(argv: list[str] | None = None, *, prog: str = "triptych encoder") -> None:
    serve(EncoderSettings, build, prog=prog, argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
