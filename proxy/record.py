"""What was done for one request, as it is done. Access log, receipts, metrics and spans are all made of this.

    began ─▶ admitted ─▶ drawn ─▶ legs ─▶ first ─▶ ended      seconds by the proxy's monotonic clock; 0: not (yet)

Holds no prompt, no media, no key and no reference to what does, so that it may be kept. Observes nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

if TYPE_CHECKING:  # core's Job has its Record
    from proxy.core import Stage
    from proxy.telemetry.trace import Trace

OK = "ok"
CANCELLED = "cancelled"


class Event(NamedTuple):
    """Something that not every request sees: a leg failed and another takes its place, …"""

    at: float
    name: str  # retry | fallback | hedge | resume
    detail: str


class Choice(NamedTuple):
    """Among whom one instance was chosen for a leg, or for an item of it."""

    urls: Sequence[str]
    scores: Sequence[float] | NDArray[Any]  # of each, the least is the best: what the policy went by, if by numbers
    unit: str  # of the scores: seconds until it would be done, tokens in work
    joined: bool = False  # the same item was being encoded there: nothing was chosen


@dataclass(slots=True, eq=False)
class LegRecord:
    """One stage of a request on one instance, once. Legs run beside each other: the list is in order of `began`."""

    stage: Stage
    url: str  # of the instance
    attempt: int  # of the request's; of an encode leg: of its items'
    items: int
    began: float
    choices: Sequence[Choice] = ()  # empty: there was nobody else
    first: float = 0.0  # what the next stage, or the client, needed of it was there; 0: as it ended
    ended: float = 0.0
    outcome: str = ""  # OK, a retry.Cause, or CANCELLED; empty while it runs
    hits: int = 0  # items whose embedding the encoder had, as it tells
    misses: int = 0
    context: str = ""  # the `traceparent` that its engine gets; empty: the client's, if it sent one

    @property
    def netloc(self) -> str:
        return self.url.partition("://")[2]


@dataclass(slots=True, eq=False)
class Record:
    """One request. `ended`, the path, the tokens, the status and the error are told once it is over."""

    id: str = ""  # x-request-id
    caller: str = ""  # the name of the client's API key
    api: str = ""  # the route's path
    model: str = ""
    stream: bool = False
    items: int = 0
    received: int = 0  # bytes of the body
    sent: int = 0  # bytes of the answer's
    began: float = 0.0
    admitted: float = 0.0
    drawn: float = 0.0  # the plan was there
    first: float = 0.0  # the first byte that proves success
    ended: float = 0.0
    path: str = "none"
    route: str = ""  # as x-triptych-route tells it: path, instances and reason of the last plan
    reason: str = ""
    attempts: int = 0
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    prompt_tokens: int = 0  # as its engine has counted them, else predicted
    output_tokens: int = 0  # as its engine has counted them, else by the bytes of its events; 0: nobody could tell
    status: int = 0  # of HTTP; 499: the client left
    error: str = ""  # stage and message, without line breaks
    code: str = ""  # of the error
    trace: Trace | None = None  # None: tracing is off
    legs: list[LegRecord] = field(default_factory=list)
    events: tuple[Event, ...] = ()

    def leg(self, stage: Stage, url: str, items: int, now: float, choices: Sequence[Choice] = ()) -> LegRecord:
        """One that begins."""
        leg = LegRecord(stage, url, self.attempts, items, now, choices)
        if self.trace is not None:
            leg.context = self.trace.child()
        self.legs.append(leg)
        return leg

    def note(self, at: float, name: str, detail: str) -> None:
        """An event that has happened."""
        self.events = (*self.events, Event(at, name, detail))
