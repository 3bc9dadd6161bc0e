"""The ways in which a scripted engine can fail a call. What each looks like on the wire, and nothing of why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Kind(Enum):
    RESET = auto()  # the connection is cut before any answer
    HANG = auto()  # no answer, ever
    STATUS = auto()  # an error answer with `status` and `error`
    GARBAGE = auto()  # 200 with a web page
    TRUNCATED = auto()  # the connection is cut in the middle of a body, or of a stream after `after` pieces
    SLOW = auto()  # the right answer, a few bytes at a time
    ERROR_EVENT = auto()  # status 200, then an error: in a stream after `after` pieces, followed by [DONE]
    STALL = auto()  # a stream that stops after `after` pieces and stays open
    NO_DONE = auto()  # a stream that ends in good order, but without [DONE]


@dataclass(frozen=True)
class Fault:
    kind: Kind
    after: int = 0
    status: int = 500
    error: str | dict[str, object] = "scripted failure"
    retry_after: str | None = None

    def body(self) -> dict[str, object]:
        if isinstance(self.error, dict):
            return {"error": self.error}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.error, "type": kind, "param": None, "code": self.status}}
