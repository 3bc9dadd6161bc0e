"""Server-sent events out of a byte stream cut anywhere. No byte is changed: the events' `raw`, joined, are the stream.

A network chunk is not an event: it may hold half of one, or three. No I/O here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A line may end in LF, CRLF or CR. A CR ends a line only once the byte after it is known not to be LF, so that the
# result does not depend on where the stream was cut.
_EOL = rb"(?:\r\n|\n|\r(?=[^\n]))"
_BLANK = re.compile(_EOL + _EOL)
_LINES = re.compile(rb"\r\n|\n|\r")
_LONGEST_BLANK = 4

DONE = b"[DONE]"


class EventTooLong(ValueError):
    """The stream went on for `limit` bytes without ending an event."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event with its terminator. Comments and fields other than `data` are only in `raw`."""

    raw: bytes

    @property
    def data(self) -> bytes:
        """The data lines, joined by LF as the standard says; empty for a comment."""
        lines = (line for line in _LINES.split(self.raw.removeprefix(b"\xef\xbb\xbf")) if line.startswith(b"data"))
        values = (line[4:] for line in lines if line[4:5] in (b"", b":"))
        return b"\n".join(value.removeprefix(b":").removeprefix(b" ") for value in values)


class Splitter:
    """Feed it chunks, get whole events. Holds at most one unfinished event, of at most `limit` bytes."""

    def __init__(self, limit: int = 16 << 20) -> None:
        self._limit = limit
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """The unfinished event's bytes so far."""
        return self._rest

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes. Raises EventTooLong."""
        searched = max(0, len(self._rest) - _LONGEST_BLANK)
        data = self._rest + chunk if self._rest else chunk
        events, start = [], 0
        while (blank := _BLANK.search(data, max(start, searched))) is not None:
            events.append(Event(data[start : blank.end()]))
            start = blank.end()
        self._rest = data[start:]
        if len(self._rest) > self._limit:
            raise EventTooLong(f"no event ended within {self._limit} bytes")
        return events

    def end(self) -> list[Event]:
        """The stream is over: a last event whose blank line ended in a bare CR, if there is one."""
        if not re.search(rb"(?:\r\n|\n|\r)(?:\r\n|\n|\r)\Z", self._rest):
            return []
        event, self._rest = Event(self._rest), b""
        return [event]
