"""`python -m engines.language.parallel STEPS CONTROL`, two file descriptors: a rank, started by rank 0 alone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys

from engines.language.parallel.rank import serve


def main(argv: list[str]) -> None:
    """Never returns. Rank 0 alone ends this process, by closing its sockets: signals to all are meant for rank 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format=f"%(asctime)s %(levelname)s %(name)s [pid {os.getpid()}] %(message)s")
    steps, control = (socket.socket(fileno=int(number)) for number in argv)
    code = 0
    try:
        asyncio.run(serve(steps, control))
    except Exception:
        logging.critical("this rank failed", exc_info=True)
        code = 1
    logging.shutdown()
    os._exit(code)  # the model thread may be in the midst of a step that will never end


if __name__ == "__main__":
    main(sys.argv[1:])
