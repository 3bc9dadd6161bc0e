"""W3C's trace context: what is understood, what is not, and who is sampled."""

from __future__ import annotations

import random
from itertools import count

import pytest

from proxy.telemetry import trace
from proxy.telemetry.trace import begin, parsed

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def dice(bits: int) -> int:
    return random.Random(7).getrandbits(bits)


def test_a_callers_context_goes_on() -> None:
    found = begin(PARENT, 0.0, dice)
    assert (found.id, found.parent, found.sampled) == (int(TRACE, 16), int(SPAN, 16), True)
    assert found.span not in (0, found.parent)


def test_a_call_gets_the_same_trace_and_a_span_of_its_own() -> None:
    numbers = count(1)
    request = begin(PARENT, 0.0, lambda bits: next(numbers))
    assert request.child() == f"00-{TRACE}-0000000000000002-01"
    assert request.child() == f"00-{TRACE}-0000000000000003-01"


@pytest.mark.parametrize("flags", ["00", "02", "fe"])
def test_the_callers_decision_not_to_sample_is_honoured(flags: str) -> None:
    request = begin(f"00-{TRACE}-{SPAN}-{flags}", 1.0, dice)
    assert not request.sampled
    assert request.child().endswith("-00")


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_what_is_no_context_begins_a_trace(parent: str) -> None:
    assert parsed(parent) is None
    request = begin(parent, 1.0, dice)
    assert request.parent == 0
    assert request.id not in (0, int(TRACE, 16))


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert parsed(f"01-{TRACE}-{SPAN}-01-what-comes") == (int(TRACE, 16), int(SPAN, 16), True)


@pytest.mark.parametrize(("share", "sampled"), [(0.0, 0), (1.0, 1000), (0.1, 100)])
def test_a_share_of_the_traces_that_begin_here_is_sampled(share: float, sampled: int) -> None:
    source = random.Random(1)
    found = sum(begin("", share, source.getrandbits).sampled for _ in range(1000))
    assert found == pytest.approx(sampled, abs=30)


def test_no_id_is_ever_zero() -> None:
    rolled = iter([0, 0, 5, 0, 6, 0, 7])
    request = begin("", 1.0, lambda bits: next(rolled))
    assert (request.id, request.span, trace.parsed(request.child())) == (5, 6, (5, 7, True))


def test_what_engines_get_of_the_callers_headers_gives_way_to_ours() -> None:
    known = {"traceparent": PARENT, "tracestate": "v=1", "baggage": "b"}
    begin(PARENT, 0.0, dice).supersede(known)
    assert known == {"tracestate": "v=1", "baggage": "b"}
    unknown = {"traceparent": "00-what", "tracestate": "v=1", "baggage": "b"}
    begin("00-what", 0.0, dice).supersede(unknown)
    assert unknown == {"baggage": "b"}, "what is not understood is not passed on"
