"""`triptych proxy`, or `python -m proxy`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from time import time as wall_clock  # noqa: TID251 - a configuration tells when it was loaded

import uvloop

from proxy.reloading import Configuration
from proxy.run import run, supervise
from proxy.settings import Sources, Wrong, refuse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 after a clean stop, 1 if the address cannot be had; wrong flags exit with 2."""
    try:
        configuration = Configuration(Sources.of(sys.argv[1:] if argv is None else argv), wall_clock)
    except Wrong as error:
        refuse("triptych proxy", error)
    settings = configuration.settings
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s",
    )
    _lighten_logging()
    try:
        if settings.workers > 1:
            return supervise(configuration)
        uvloop.run(run(configuration))
    except OSError as error:
        print(f"triptych proxy: cannot listen on {settings.host}:{settings.port}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _lighten_logging() -> None:
    """Collect nothing for a record that the format does not show: half the cost of a request's line.

    These are the switches of logging's manual, "Optimization"; without `_srcfile` no stack is walked for the caller.
    """
    logging.logThreads = logging.logMultiprocessing = False
    logging._srcfile = None


if __name__ == "__main__":
    sys.exit(main())
