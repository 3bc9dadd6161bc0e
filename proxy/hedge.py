"""When to start a second attempt beside a slow one: after fixed seconds, or a percentile of what was seen. Pure."""

from __future__ import annotations

import re
from collections import deque

_WINDOW = 256
_ENOUGH = 20  # observations before a percentile is believed
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?)")


class Hedge:
    """`after`: seconds ("0.5"), a percentile ("p95"), or empty for never. Raises ValueError."""

    def __init__(self, after: str) -> None:
        self._seconds: float | None = None
        self._quantile: float | None = None
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        if match := _PERCENTILE.fullmatch(after.strip()):
            self._quantile = float(match[1]) / 100
        elif after.strip():
            self._seconds = _positive(after)

    def observe(self, seconds: float) -> None:
        """How long an attempt took that went well."""
        if self._quantile is not None:
            self._seen.append(seconds)

    def delay(self) -> float | None:
        """Seconds to wait before the second attempt; None: do not make one."""
        if self._quantile is None or len(self._seen) < _ENOUGH:
            return self._seconds
        ordered = sorted(self._seen)
        return ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{text!r} is neither seconds like 0.5 nor a percentile like p95")
    return seconds
