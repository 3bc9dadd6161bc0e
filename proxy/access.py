"""The access log: one line per request, written in batches. For everything else there is `logging`.

A line through `logging` costs as much as all the proxy does between reading a request and choosing its engines, and a
write of its own; so lines are formatted here and written together, ten times a second.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TextIO

_FLUSH_S = 0.1
_FLUSH_LINES = 256


class AccessLog:
    """Lines for `stream`; with None they go nowhere. On the event loop only."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._pid = os.getpid()
        self._second = (0, "")

    def write(self, line: str) -> None:
        """Adds when and who, as the other lines of the log have it."""
        if self._stream is None:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        now = time.time()  # noqa: TID251 - a log tells the time of day
        whole = int(now)
        if whole != self._second[0]:
            self._second = (whole, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(whole)))
        self._lines.append(f"{self._second[1]},{(now - whole) * 1000:03.0f} {self._pid} INFO proxy.access {line}\n")
        if len(self._lines) >= _FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self._stream is not None and self._lines:
            lines, self._lines = self._lines, []
            self._stream.write("".join(lines))
            self._stream.flush()
