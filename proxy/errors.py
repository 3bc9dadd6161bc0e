"""What can go wrong, as the client sees it. Nothing here logs, retries or sends.

ProxyError                    500  the tree's root; a class carries status, type, code
├─ BadRequest                 400  the client's mistake, found before any engine was called
│  ├─ ForbiddenField          400  a field that only the proxy may set
│  ├─ ForbiddenMedia          403  a URL that clients may not name
│  └─ TooLarge                413
├─ NotFound                   404
├─ Conflict                   409
├─ Unauthorized               401  the admin key is missing or wrong
│  └─ InvalidKey              401  an API key is
├─ Forbidden                  403  a right API key, but not for this
├─ NoInstance                 503  nobody can take this stage now
├─ Overloaded                 429  more waits already than may
│  ├─ TooLate                 429  its target cannot be met any more
│  ├─ RateLimited             429  its API key has used up what it may
│  └─ TriedTooOften           429  too many wrong keys came from its address
├─ QueueTimeout               503  no place became free in time
├─ DeadlineExceeded           504  the request's own time is over
├─ EngineFailed               502  an engine was called and did not do its part
│  ├─ Unreachable             502  no connection
│  ├─ Broken                  502  reset, truncated, or not the promised format
│  ├─ StageTimeout            504  the stage's deadline passed
│  ├─ GaveUp                  503  it ended an answer before its end, in good order
│  └─ Refused                 the engine's own status and message, kept
└─ ShuttingDown               503
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from proxy.core import Stage
from proxy.telemetry.redaction import redacted

_LONGEST = 500  # characters of what an engine said in no message, that are passed on


class ProxyError(Exception):
    """`retryable` says that the same request may succeed if sent again; `stage` says where it failed."""

    status = 500
    type = "internal_error"
    code: str | int | None = "internal_error"
    retryable = False
    stage = Stage.PROXY

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        stage: Stage | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = type(self).code if code is None else code
        self.stage = type(self).stage if stage is None else stage
        self.retryable = type(self).retryable if retryable is None else retryable
        self.retry_after = retry_after  # seconds, for the header of that name
        self.attempts = 1

    @property
    def told(self) -> str:
        """The message as it may be logged."""
        return redacted(self.message)

    def body(self) -> dict[str, Any]:
        """The error object of DESIGN's contract."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "stage": str(self.stage),
                "retryable": self.retryable,
                "attempts": self.attempts,
            }
        }

    def settle(self) -> None:
        """It has been dealt with: let go of the frames it came through.

        Some of them hold it in turn, and a request with all its bytes: that circle would last until it is collected.
        """
        self.__traceback__ = self.__context__ = None

    def json(self) -> bytes:
        return orjson.dumps(self.body())

    def event(self) -> bytes:
        """The last event of a stream that broke after its first byte."""
        return b"data: " + self.json() + b"\n\n"


class BadRequest(ProxyError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ForbiddenField(BadRequest):
    code = "forbidden_field"


class ForbiddenMedia(BadRequest):
    status = 403
    code = "media_forbidden"


class TooLarge(BadRequest):
    status = 413
    code = "body_too_large"


class NotFound(ProxyError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(ProxyError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Unauthorized(ProxyError):
    status = 401
    type = "authentication_error"
    code = "invalid_admin_key"


class InvalidKey(Unauthorized):
    code = "invalid_api_key"


class Forbidden(ProxyError):
    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class NoInstance(ProxyError):
    status = 503
    type = "service_unavailable"
    code = "no_instance"
    retryable = True


class Overloaded(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retryable = True

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=max(1.0, retry_after))


class TooLate(Overloaded):
    code = "target_missed"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class TriedTooOften(Overloaded):
    code = "too_many_wrong_keys"


class QueueTimeout(ProxyError):
    status = 503
    type = "service_unavailable"
    code = "queue_timeout"
    retryable = True


class DeadlineExceeded(ProxyError):
    status = 504
    type = "timeout_error"
    code = "request_timeout"


class ShuttingDown(ProxyError):
    status = 503
    type = "service_unavailable"
    code = "shutting_down"
    retryable = True


class EngineFailed(ProxyError):
    status = 502
    type = "engine_error"
    code = "engine_failed"
    retryable = True


class Unreachable(EngineFailed):
    code = "engine_unreachable"


class Broken(EngineFailed):
    code = "engine_broken"


class StageTimeout(EngineFailed):
    status = 504
    type = "timeout_error"
    code = "stage_timeout"


class GaveUp(EngineFailed):
    status = 503
    type = "service_unavailable"
    code = "given_up"


class Refused(EngineFailed):
    """An engine's own error answer: its status, message, type, param and code are kept."""

    def __init__(
        self, status: int, answer: bytes | Mapping[str, Any], *, stage: Stage, retry_after: str | None = None
    ) -> None:
        """`answer`: as it came, or parsed."""
        said = _said(answer)
        told = said.get("message")
        super().__init__(
            _text(told) or (_words(told) if told else f"the {stage} engine answered {status} and said nothing"),
            param=_text(said.get("param")),
            code=said.get("code") if isinstance(said.get("code"), str | int) else status,
            stage=_stage(said.get("stage"), stage),
            retryable=bool(said.get("retryable", status >= 500 or status == 429)),
            retry_after=_seconds(retry_after),
        )
        self.status = status if 400 <= status <= 599 else 502
        self.type = _text(said.get("type")) or ("invalid_request_error" if status < 500 else "engine_error")

    @property
    def told(self) -> str:
        """Who refuses a request says why in its own words, the prompt's among them: these are for the client alone."""
        return redacted(self.message) if self.status >= 500 else f"refused with {self.status}"


def _said(answer: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """The error object in an engine's answer: OpenAI's form, an older flat form, FastAPI's `detail`, or plain text."""
    parsed: Any = answer
    if isinstance(answer, bytes):
        try:
            parsed = orjson.loads(answer)
        except orjson.JSONDecodeError:
            return {"message": answer[:_LONGEST].decode("utf-8", "replace").strip()}
    if not isinstance(parsed, dict):
        return {"message": _words(parsed)}
    inner = parsed.get("error", parsed)
    if isinstance(inner, dict):
        return inner if "message" in inner else {"message": _words(inner.get("detail", inner))}
    return {"message": _words(inner)}


def _words(value: Any) -> str:
    try:
        return str(value)[:_LONGEST]
    except RecursionError:
        return "an error that is nested too deeply to be told"


def _seconds(value: str | None) -> float | None:
    """A Retry-After header in seconds. One that names a date is not followed: its clock is not ours."""
    text = (value or "").strip()
    return float(text) if text.isascii() and text.isdigit() else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _stage(value: Any, default: Stage) -> Stage:
    return Stage(value) if isinstance(value, str) and value in set(Stage) else default


def within_200(event: Mapping[str, Any], *, stage: Stage) -> Refused:
    """The failure that an error object tells of although the status was 200, in a stream or whole."""
    inner = event.get("error")
    code = inner.get("code") if isinstance(inner, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    return Refused(status, event, stage=stage)
