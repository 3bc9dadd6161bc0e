"""What is written down of a request: its legs in the order they began, what happened beside, and nothing it carried."""

from __future__ import annotations

from itertools import count

from proxy.core import Stage
from proxy.record import Event, Record
from proxy.telemetry.trace import begin


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
    assert record.events == (Event(3.0, "retry", "prefill: connect"),)


def test_each_leg_of_a_traced_request_has_a_context_of_its_own() -> None:
    ids = count(1)
    record = Record(trace=begin("", 1.0, lambda bits: next(ids)))
    contexts = [record.leg(Stage.DECODE, "http://d:1", 0, 0.0).context for _ in range(2)]
    assert contexts == [f"00-{1:032x}-{span:016x}-01" for span in (3, 4)]
    assert Record().leg(Stage.DECODE, "http://d:1", 0, 0.0).context == ""
