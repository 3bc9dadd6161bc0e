"""Who may touch memory, as two tables: one for a receiver's ticket, one for a sender's push.

No I/O and no memory here. Every state answers one question, "can somebody else still touch these bytes?"; everything
else (why it failed, who waits) belongs to the objects that carry the state.

    ticket    RESERVED ─claim─▶ WRITING ─done─▶ COMPLETE ─release─▶ FREE
                 │                 ├─fail────▶ BROKEN ──release──▶ FREE
                 └─expire─▶ BROKEN ├─expire, lose▶ DOOMED ─settle─▶ BROKEN
                                   └─release─▶ QUARANTINED ─settle─▶ FREE      (also from DOOMED)

    push      OPEN ─finish─▶ DRAINING ─drain─▶ SETTLED
                 └─stop─▶ STOPPING ──drain──▶ SETTLED,   lose from any of the three ─▶ UNSETTLED ─settle─▶ SETTLED
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar


class TicketState(Enum):
    RESERVED = "reserved"
    """Promised; nobody may write yet."""
    WRITING = "writing"
    """One named writer holds it."""
    COMPLETE = "complete"
    """All bytes are there; they are the reader's until release."""
    BROKEN = "broken"
    """Failed or expired, and nobody writes."""
    DOOMED = "doomed"
    """Failed or expired, but the writer may still write."""
    QUARANTINED = "quarantined"
    """Released while the writer may still write: the memory is nobody's."""
    FREE = "free"
    """Given back."""


class TicketEvent(Enum):
    CLAIM = "claim"
    DONE = "done"
    FAIL = "fail"
    """The writer gave up and has stopped writing."""
    LOSE = "lose"
    """The writer gave up and cannot say whether bytes still move."""
    EXPIRE = "expire"
    SETTLE = "settle"
    """It is proved that nobody writes any more."""
    RELEASE = "release"


class PushState(Enum):
    OPEN = "open"
    DRAINING = "draining"
    STOPPING = "stopping"
    UNSETTLED = "unsettled"
    SETTLED = "settled"


class PushEvent(Enum):
    FINISH = "finish"
    STOP = "stop"
    DRAIN = "drain"
    """The sender thread has passed the last write of this push, and each one settled."""
    LOSE = "lose"
    """A write ended without saying whether bytes still move."""
    SETTLE = "settle"


TICKET: Mapping[TicketState, Mapping[TicketEvent, TicketState]] = {
    TicketState.RESERVED: {
        TicketEvent.CLAIM: TicketState.WRITING,
        TicketEvent.EXPIRE: TicketState.BROKEN,
        TicketEvent.RELEASE: TicketState.FREE,
    },
    TicketState.WRITING: {
        TicketEvent.DONE: TicketState.COMPLETE,
        TicketEvent.FAIL: TicketState.BROKEN,
        TicketEvent.LOSE: TicketState.DOOMED,
        TicketEvent.EXPIRE: TicketState.DOOMED,
        TicketEvent.RELEASE: TicketState.QUARANTINED,
    },
    TicketState.COMPLETE: {TicketEvent.RELEASE: TicketState.FREE},
    TicketState.BROKEN: {TicketEvent.RELEASE: TicketState.FREE},
    TicketState.DOOMED: {
        TicketEvent.SETTLE: TicketState.BROKEN,
        TicketEvent.RELEASE: TicketState.QUARANTINED,
    },
    TicketState.QUARANTINED: {TicketEvent.SETTLE: TicketState.FREE},
    TicketState.FREE: {},
}

PUSH: Mapping[PushState, Mapping[PushEvent, PushState]] = {
    PushState.OPEN: {
        PushEvent.FINISH: PushState.DRAINING,
        PushEvent.STOP: PushState.STOPPING,
        PushEvent.LOSE: PushState.UNSETTLED,
    },
    PushState.DRAINING: {
        PushEvent.STOP: PushState.STOPPING,
        PushEvent.DRAIN: PushState.SETTLED,
        PushEvent.LOSE: PushState.UNSETTLED,
    },
    PushState.STOPPING: {
        PushEvent.DRAIN: PushState.SETTLED,
        PushEvent.LOSE: PushState.UNSETTLED,
    },
    PushState.UNSETTLED: {PushEvent.SETTLE: PushState.SETTLED},
    PushState.SETTLED: {},
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class IllegalTransition(RuntimeError):
    """A bug of ours: the event cannot happen in this state."""


class Machine(Generic[S, E]):
    """A state that only its table can change."""

    __slots__ = ("_table", "role", "state")

    def __init__(self, role: str, table: Mapping[S, Mapping[E, S]], start: S) -> None:
        self.role, self._table, self.state = role, table, start

    def allows(self, event: E) -> bool:
        return event in self._table[self.state]

    def fire(self, event: E) -> S:
        """Move, or raise IllegalTransition naming role, event and state; a refused event changes nothing."""
        try:
            self.state = self._table[self.state][event]
        except KeyError:
            raise IllegalTransition(f"{self.role}: event {event.value!r} in state {self.state.value!r}") from None
        return self.state

    def __repr__(self) -> str:
        return f"<{self.role} {self.state.value}>"


def ticket_machine() -> Machine[TicketState, TicketEvent]:
    return Machine("ticket", TICKET, TicketState.RESERVED)


def push_machine() -> Machine[PushState, PushEvent]:
    return Machine("push", PUSH, PushState.OPEN)
