"""The access log: one line per request, written in batches. For everything else there is `logging`.

A line through `logging` costs as much as all the proxy does between reading a request and choosing its engines, and a
write of its own; so lines are formatted here and written together, ten times a second. No line has a header's value, a
URL of media or anything of a body in it.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Literal, TextIO

import orjson

from proxy.record import Record

Form = Literal["console", "json", "off"]

_FLUSH_S = 0.1
_FLUSH_LINES = 256


class AccessLog:
    """Lines for `stream`. On the event loop only."""

    def __init__(self, stream: TextIO, form: Form = "console") -> None:
        self._stream = stream
        self._form = form
        self._lines: list[str] = []
        self._pid = os.getpid()
        self._second = (0, "", "")

    def ended(self, record: Record) -> None:
        """A request is over."""
        if self._form == "off":
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        self._lines.append(self._console(record) if self._form == "console" else self._json(record))
        if len(self._lines) >= _FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self._lines:
            lines, self._lines = self._lines, []
            self._stream.write("".join(lines))
            self._stream.flush()

    def _console(self, record: Record) -> str:
        """With when and who, as the other lines of the log have it."""
        milliseconds, local, _ = self._when(record.ended)
        timings = "".join([f" {name}={s * 1000:.0f}ms" for name, s in record.timings.items()])
        key = f" key={record.caller}" if record.caller else ""
        told = f" error={record.error}" if record.error else ""
        return (
            f"{local},{milliseconds} {self._pid} INFO proxy.access {record.id} {record.api} {record.status} "
            f"e2e={(record.ended - record.began) * 1000:.0f}ms{timings}{key} route={record.route!r}{told}\n"
        )

    def _json(self, record: Record) -> str:
        """Times are in seconds. What nobody could tell, or what was not there, is left out."""
        milliseconds, _, utc = self._when(record.ended)
        line: dict[str, object] = {
            "time": f"{utc}.{milliseconds}Z",
            "id": record.id,
            "api": record.api,
            "model": record.model,
            "status": record.status,
            "seconds": round(record.ended - record.began, 6),
            "path": record.path,
        }
        more = {
            "key": record.caller,
            "reason": record.reason,
            "ttft": round(record.first - record.began, 6) if record.first else None,
            "timings": {name: round(seconds, 6) for name, seconds in record.timings.items()},
            "stream": record.stream,
            "items": record.items,
            "attempts": record.attempts,
            "instances": [leg.netloc for leg in record.legs],
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "received": record.received,
            "sent": record.sent,
            "code": record.code,
            "error": record.error,
        }
        return orjson.dumps(line | {name: value for name, value in more.items() if value}).decode() + "\n"

    def _when(self, ended: float) -> tuple[str, str, str]:
        """Milliseconds, and the second they are of: local time, and UTC."""
        now = ended + time.time() - time.monotonic()  # noqa: TID251 - a log tells the time of day
        whole = int(now)
        if whole != self._second[0]:
            local, utc = (time.strftime(form, of(whole)) for form, of in _FORMS)
            self._second = (whole, local, utc)
        return f"{(now - whole) * 1000:03.0f}", *self._second[1:]


_FORMS = (("%Y-%m-%d %H:%M:%S", time.localtime), ("%Y-%m-%dT%H:%M:%S", time.gmtime))
