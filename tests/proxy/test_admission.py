"""Places, bytes and the queue: who is let in, in which order, and that every place comes back once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.admission import Admission, Entry, Limits, Place
from proxy.errors import Overloaded, TooLarge


def admission(requests: int = 2, nbytes: int = 100, queue: int = 3) -> Admission:
    return Admission(Limits(requests, nbytes, queue, 1.0))


def test_places_and_bytes_are_both_limits() -> None:
    a = admission()
    one, _ = a.arrive(0, 60)
    two, _ = a.arrive(0, 60)
    assert (one.place, two.place, a.nbytes) == (Place.ADMITTED, Place.WAITING, 60)
    small, _ = a.arrive(0, 1)
    assert small.place is Place.WAITING, "nobody overtakes for being small"
    assert a.leave(one) == [two, small] and a.leave(one) == []
    assert (a.requests, a.nbytes, a.waiting) == (2, 61, 0)


def test_a_body_that_could_never_go_in_is_too_large() -> None:
    with pytest.raises(TooLarge, match="101 bytes"):
        admission().arrive(0, 101)


def test_the_urgent_go_first_and_among_equals_the_first() -> None:
    a = admission(requests=1)
    running, _ = a.arrive(0, 1)
    late, early, urgent = (a.arrive(priority, 1)[0] for priority in (5, 5, -1))
    order = []
    while next_ := a.leave(running):
        (running,) = next_
        order.append(running)
    assert order == [urgent, late, early]
    assert (a.requests, a.nbytes) == (0, 0)


def test_a_full_queue_refuses_unless_somebody_less_urgent_waits() -> None:
    a = admission(requests=1, queue=2)
    a.arrive(0, 1)
    first, second = a.arrive(1, 1)[0], a.arrive(1, 1)[0]
    with pytest.raises(Overloaded) as refused:
        a.arrive(1, 1)
    assert (refused.value.status, refused.value.retry_after) == (429, 1.0)
    urgent, pushed = a.arrive(0, 1)
    assert pushed is second and second.place is Place.REFUSED and a.waiting == 2
    assert a.leave(second) == [] and a.waiting == 2
    assert first.place is urgent.place is Place.WAITING


STEPS = st.lists(st.tuples(st.sampled_from(["arrive", "leave"]), st.integers(-1, 2), st.integers(0, 50)), max_size=60)


@given(STEPS)
def test_whatever_happens_every_place_is_given_back(steps: list[tuple[str, int, int]]) -> None:
    a = admission(requests=3, nbytes=80, queue=4)
    entries: list[Entry] = []
    for what, priority, number in steps:
        if what == "arrive":
            try:
                entries.append(a.arrive(priority, number)[0])
            except Overloaded:
                assert a.waiting == 4
        elif entries:
            for admitted in a.leave(entries.pop(number % len(entries))):
                assert admitted.place is Place.ADMITTED
        inside = [entry for entry in entries if entry.place is Place.ADMITTED]
        assert (a.requests, a.nbytes) == (len(inside), sum(entry.nbytes for entry in inside))
        assert a.requests <= 3 and a.nbytes <= 80
        waiting = sorted(entry for entry in entries if entry.place is Place.WAITING)
        assert a.waiting == len(waiting) <= 4
        if waiting:
            assert a.requests == 3 or a.nbytes + waiting[0].nbytes > 80, "nobody waits for nothing"
    for entry in entries:
        a.leave(entry)
    assert (a.requests, a.nbytes, a.waiting) == (0, 0, 0)
