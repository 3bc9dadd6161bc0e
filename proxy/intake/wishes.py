"""What a client asks of the proxy itself: to go before others, and to be answered in time. Pure; engines see it too."""

from __future__ import annotations

import math

from proxy.core import Job
from proxy.errors import BadRequest


def priority(job: Job) -> int:
    """A lower number goes first, as in vLLM. What is no number is none."""
    asked = job.body.get("priority", job.headers.get("x-priority", 0))
    try:
        return int(asked)
    except (TypeError, ValueError, OverflowError):
        return 0


def seconds(job: Job) -> float | None:
    """The client's own deadline. Raises BadRequest."""
    return _seconds(job, "x-request-timeout")


def first_token(job: Job) -> float | None:
    """Seconds from the request's arrival within which the client wants its first token. Raises BadRequest."""
    return _seconds(job, "x-ttft-target")


def _seconds(job: Job, header: str) -> float | None:
    asked = job.headers.get(header)
    if asked is None:
        return None
    try:
        found = float(asked)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise BadRequest(f"{header} must be a number of seconds above 0", param=header)
    return found
