"""The tables themselves, iterated: nothing is reachable that the words of the contract do not allow."""

from itertools import product

import pytest

from engines.transfer.lifecycle import (
    PUSH,
    TICKET,
    IllegalTransition,
    Machine,
    PushEvent,
    PushState,
    TicketEvent,
    TicketState,
    push_machine,
    ticket_machine,
)

TABLES = {
    "ticket": (TICKET, TicketState, TicketEvent, TicketState.RESERVED, TicketState.FREE),
    "push": (PUSH, PushState, PushEvent, PushState.OPEN, PushState.SETTLED),
}
EVERY = [
    (role, state, event)
    for role, (_, states, events, _, _) in TABLES.items()
    for state, event in product(states, events)
]


@pytest.mark.parametrize(("role", "state", "event"), EVERY, ids=lambda value: getattr(value, "value", value))
def test_every_event_in_every_state_moves_or_is_named(role, state, event):
    table = TABLES[role][0]
    machine = Machine(role, table, state)
    assert machine.allows(event) == (event in table[state])
    if event in table[state]:
        assert machine.fire(event) is table[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{role}: event '{event.value}' in state '{state.value}'"):
            machine.fire(event)
        assert machine.state is state


@pytest.mark.parametrize("role", TABLES)
def test_every_state_is_reachable_and_leads_to_the_end(role):
    table, states, _, start, end = TABLES[role]
    assert set(table) == set(states)
    assert _closure(table, start) == set(states)
    assert all(end in _closure(table, state) for state in states)
    assert not table[end]


def _closure(table, start):
    seen, queue = {start}, [start]
    while queue:
        for state in table[queue.pop()].values():
            if state not in seen:
                seen.add(state)
                queue.append(state)
    return seen


def test_memory_that_a_writer_may_touch_is_freed_only_by_settling():
    at_risk = {TicketState.DOOMED, TicketState.QUARANTINED}
    for state in at_risk:
        safe = {event for event, after in TICKET[state].items() if after not in at_risk}
        assert safe == {TicketEvent.SETTLE}


def test_a_ticket_is_writable_only_after_a_claim_and_complete_only_after_done():
    into = {(event, after) for moves in TICKET.values() for event, after in moves.items()}
    assert {event for event, after in into if after is TicketState.WRITING} == {TicketEvent.CLAIM}
    assert {event for event, after in into if after is TicketState.COMPLETE} == {TicketEvent.DONE}


def test_a_lost_write_settles_only_by_proof():
    assert PUSH[PushState.UNSETTLED] == {PushEvent.SETTLE: PushState.SETTLED}


def test_machines_start_at_the_start_and_show_their_state():
    assert repr(ticket_machine()) == "<ticket reserved>"
    assert repr(push_machine()) == "<push open>"
