"""What a failed leg means: whether another instance may do better, and what it says of the one that failed. One table.

Nothing is retried here, and no clock is read. Once a client has seen a byte, nothing of this applies but blame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from proxy.core import BOTH, Item, Path, Role, Stage
from proxy.errors import EngineFailed, GaveUp, ProxyError, Refused, StageTimeout, Unreachable


class Cause(StrEnum):
    """Why a leg failed, as far as that decides what to do."""

    CONNECT = "connect"  # no connection: nothing was sent
    TIMEOUT = "timeout"  # a stage's patience ended
    BROKEN = "broken"  # reset, truncated, no HTTP, a web page with status 200, no JSON
    SERVER_ERROR = "server_error"  # 5xx, or an error told within a 200
    BUSY = "busy"  # 429, or 503 that says when to come again, or of an engine of ours that turns to another role
    MEDIA = "media"  # 5xx of an engine that had to fetch media, and does not tell its own faults from their URL's
    LOST = "lost"  # the engine is well, but what was made for this request is gone
    CLIENT = "client"  # any other 4xx: the client's mistake, which no instance can mend
    OURS = "ours"  # no engine was called


class Blame(Enum):
    """What a failure says of the instance."""

    NONE = auto()
    FAILURE = auto()  # one more in a row
    AVOID = auto()  # it asks to be left alone for a time
    DEAD = auto()  # nobody listens


@dataclass(frozen=True, slots=True)
class Rule:
    """`elsewhere`: another instance may be asked. `again`: the same one may, if there is no other."""

    elsewhere: bool
    again: bool
    blame: Blame


RULES: Mapping[Cause, Rule] = {
    Cause.CONNECT: Rule(elsewhere=True, again=False, blame=Blame.DEAD),
    Cause.TIMEOUT: Rule(elsewhere=True, again=False, blame=Blame.FAILURE),
    Cause.BROKEN: Rule(elsewhere=True, again=False, blame=Blame.FAILURE),
    Cause.SERVER_ERROR: Rule(elsewhere=True, again=False, blame=Blame.FAILURE),
    Cause.BUSY: Rule(elsewhere=True, again=False, blame=Blame.AVOID),
    Cause.MEDIA: Rule(elsewhere=True, again=False, blame=Blame.NONE),
    Cause.LOST: Rule(elsewhere=True, again=True, blame=Blame.NONE),
    Cause.CLIENT: Rule(elsewhere=False, again=False, blame=Blame.NONE),
    Cause.OURS: Rule(elsewhere=False, again=False, blame=Blame.NONE),
}

# Codes of our engines: an embedding or the KV of a prompt is gone. Making it again helps; after a timeout, elsewhere.
_LOST = frozenset({"embedding_gone", "embedding_invalid", "kv_gone", "peer_failed", "peer_unreachable"})
_TURNED = "other_role"
TURNED_S = 1.0
"""For so long an engine is left alone that has said so: probes tell what has become of it."""
_MEDIA = "media_or_engine"
_ROLES = {Stage.ENCODE: Role.ENCODE, Stage.PREFILL: Role.PREFILL, Stage.DECODE: Role.DECODE}
STAGES = {Role.ENCODE: Stage.ENCODE, Role.PREFILL: Stage.PREFILL, Role.DECODE: Stage.DECODE, BOTH: Stage.DECODE}
"""The stage that a leg of each role is."""


def cause(error: ProxyError) -> Cause:
    """The row of the table that `error` belongs to."""
    if isinstance(error, Unreachable):
        return Cause.CONNECT
    if isinstance(error, StageTimeout):
        return Cause.TIMEOUT
    if isinstance(error, GaveUp):
        return Cause.LOST
    if isinstance(error, Refused):
        return _refused(error)
    return Cause.BROKEN if isinstance(error, EngineFailed) else Cause.OURS


def _refused(error: Refused) -> Cause:
    if error.status == 429 or (error.status == 503 and (error.retry_after is not None or error.code == _TURNED)):
        return Cause.BUSY
    if error.code in _LOST:
        return Cause.LOST
    if error.code == _MEDIA:
        return Cause.MEDIA
    return Cause.SERVER_ERROR if error.status >= 500 else Cause.CLIENT


class fetching:
    """Within, an engine is called that may have to fetch `items`, and answers 5xx if it cannot: a client's wrong URL
    must not keep engines from others."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Refused) and error.status >= 500 and any(item.mm_hash is None for item in self._items):
            error.code = _MEDIA


def rule(error: ProxyError) -> Rule:
    return RULES[cause(error)]


def avoidance(error: ProxyError) -> float | None:
    """Seconds for which an engine that is BUSY is given nothing; None: it does not say."""
    if error.retry_after is None and isinstance(error, Refused) and error.code == _TURNED:
        return TURNED_S
    return error.retry_after


def unread(error: ProxyError) -> bool:
    """Whether the decode engine that failed so cannot have begun to read what prefill keeps for it: another one may."""
    return cause(error) is Cause.CONNECT or (isinstance(error, Refused) and error.code == _TURNED)


def culprit(error: ProxyError, path: Path) -> Role:
    """The role to replace: engines tell the stage that failed, which need not be their own."""
    role = _ROLES.get(error.stage, Role.DECODE)
    if role is not Role.ENCODE and BOTH in path.roles:
        return BOTH
    return role
