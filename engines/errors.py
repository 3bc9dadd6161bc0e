"""The engines' error tree; no HTTP here: `engines.http` turns an error into a response at one edge.

    EngineError            500  internal_error          a bug, or a state nobody foresaw
    ├── Unauthorized       401  authentication_error    --key is set, and this is not it
    ├── BadRequest         400  invalid_request_error   the request can never succeed as it is
    │   ├── Forbidden      403                          understood, and not allowed here
    │   ├── NotFound       404                          no such route or model
    │   └── TooLarge       413                          over a limit that the message names
    ├── Overloaded         503  overloaded              no room now; the same request may succeed later
    ├── ShuttingDown       503  shutting_down           ask another engine
    ├── OtherRole          503  other_role              the same: it is turning to another role, or has turned
    ├── PeerFailed         502  peer_failed             another engine or a remote host let us down
    └── DeadlineExceeded   504  deadline_exceeded       a wait ended; the message names its flag

The class carries status, type, code and whether a retry can help; the instance carries the message and may override
the code and retryability. `SetupError` and `Fatal` are not part of the tree: they end the process, before it serves and
later.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class SetupError(Exception):
    """The engine cannot start as configured; the message says what to change. Exit status 2, no traceback."""


class Fatal(Exception):
    """The engine serves, and cannot go on; the message says why. Exit status 1, no traceback."""


class EngineError(Exception):
    """What a client is told when a request fails. The message says what to do about it.

    param: the path in the request body of what is wrong, e.g. `messages[0].content[2]`.
    stage: encode, prefill or decode; None means the stage of the engine that answers.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str] = "internal_error"
    can_retry: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        stage: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.stage = stage
        self.retryable = self.can_retry if retryable is None else retryable

    def body(self, stage: str | None = None) -> dict[str, Any]:
        """The OpenAI-shaped JSON of this error; `stage` serves where the error names none."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "stage": self.stage or stage,
                "retryable": self.retryable,
            }
        }

    def at(self, param: str) -> Self:
        """The same error at one place of one request; a failure that several requests share is told to each."""
        same = {"code": self.code, "stage": self.stage, "retryable": self.retryable}
        return type(self)(f"{param}: {self.message}", param=param, **same)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status} {self.code}: {self.message})"


class Unauthorized(EngineError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class BadRequest(EngineError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class Forbidden(BadRequest):
    status = 403
    default_code = "forbidden"


class NotFound(BadRequest):
    status = 404
    default_code = "not_found"


class TooLarge(BadRequest):
    status = 413
    default_code = "too_large"


class Overloaded(EngineError):
    status = 503
    type = "overloaded_error"
    default_code = "overloaded"
    can_retry = True


class ShuttingDown(EngineError):
    status = 503
    type = "unavailable_error"
    default_code = "shutting_down"
    can_retry = True


class OtherRole(EngineError):
    status = 503
    type = "unavailable_error"
    default_code = "other_role"
    can_retry = True


class PeerFailed(EngineError):
    status = 502
    type = "upstream_error"
    default_code = "peer_failed"
    can_retry = True


class DeadlineExceeded(EngineError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
    can_retry = True
