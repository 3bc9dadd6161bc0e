"""What is written down of a request: its legs in the order they began, what happened beside, and nothing it carried."""

from __future__ import annotations

from proxy.core import Stage
from proxy.record import Event, Record


def test_legs_are_told_in_the_order_they_began_with_the_attempt_they_belong_to() -> None:
    record = Record(attempts=1)
    record.leg(Stage.PREFILL, "http://p:1", 0, 1.0)
    record.attempts = 2
    again = record.leg(Stage.PREFILL, "http://p:2", 0, 2.0)
    assert [(leg.url, leg.attempt, leg.began) for leg in record.legs] == [
        ("http://p:1", 1, 1.0),
        ("http://p:2", 2, 2.0),
    ]
    assert (again.ended, again.outcome) == (0.0, ""), "it runs"


def test_events_keep_when_and_what() -> None:
    record = Record()
    record.note(3.0, "retry", "prefill: connect")
    assert record.events == [Event(3.0, "retry", "prefill: connect")]
