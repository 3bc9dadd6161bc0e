"""Places, bytes and the queue: who is let in, in which order, and that every place comes back once."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import Stage
from proxy.errors import Overloaded, TooLarge, TooLate
from proxy.intake.admission import Admission, Entry, Limits, Outlook, Place, Wish


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


# ---- wishes


@dataclass
class World:
    """Seconds of work before every encoder, prefill and decode engine. Idle engines take 1 s to a first token."""

    encode: float = 0.0
    prefill: float = 0.0
    pace: float = 0.01
    room: bool = True

    def wish(self, media: bool, first: float = inf, pace: float = inf) -> Wish:
        def foresee() -> Outlook:
            encode = self.encode if media else 0.0
            stage = Stage.ENCODE if encode > self.prefill else Stage.PREFILL
            return Outlook(1.0 + max(encode, self.prefill), 1.0, self.pace, 0.01, stage, self.room or not media)

        return Wish(media, foresee, first, pace)


def test_with_a_target_that_is_met_or_idle_engines_nobody_waits() -> None:
    world, a = World(encode=0.5), admission(10)
    assert a.arrive(0, 1, world.wish(True, 1.5), 100.0)[0].place is Place.ADMITTED
    assert a.arrive(0, 1, world.wish(False, 0.1), 100.0)[0].place is Place.ADMITTED, "no engine could do better"


def test_one_that_misses_its_target_is_parked_until_load_drains() -> None:
    world, a = World(prefill=5.0), admission(10)
    entry, _ = a.arrive(0, 1, world.wish(False, 4.0), 100.0)
    assert (entry.place, entry.parked, entry.latest) == (Place.WAITING, Stage.PREFILL, 103.0)
    world.prefill = 3.0
    assert a.promote(101.0) == [], "a second of its four has passed"
    world.prefill = 2.0
    assert a.promote(101.0) == [entry]
    assert (a.requests, a.waiting) == (1, 0)


def test_one_that_waiting_cannot_help_is_refused_with_the_time_that_the_load_takes() -> None:
    world, a = World(encode=7.0), admission(10)
    told = r"wished for within 0\.9 s .* it would take 8 s, most of it for encode, and idle engines would take 1 s"
    with pytest.raises(TooLate, match=told) as refused:
        a.arrive(0, 1, world.wish(True, 0.9), 100.0)
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "target_missed", 7.0)
    assert (a.requests, a.nbytes, a.waiting) == (0, 0, 0)


def test_a_pace_is_a_target_too() -> None:
    world, a = World(pace=0.2), admission(10)
    entry, _ = a.arrive(0, 1, world.wish(False, pace=0.1), 100.0)
    assert (entry.place, entry.parked, entry.latest) == (Place.WAITING, Stage.DECODE, inf)
    assert a.promote(105.0) == []
    world.pace = 0.1
    assert a.promote(106.0) == [entry]
    world.pace = 0.0101
    assert a.arrive(0, 1, world.wish(False, pace=0.001), 106.0)[0].place is Place.ADMITTED, "decode is idle"


def test_media_that_wait_for_encoders_hold_back_media_alone() -> None:
    world, a = World(encode=5.0), admission(10)
    parked, _ = a.arrive(0, 1, world.wish(True, 4.0), 100.0)
    assert a.arrive(1, 1, world.wish(False, 4.0), 100.0)[0].place is Place.ADMITTED, "text needs no encoder"
    assert a.arrive(1, 1, None, 100.0)[0].place is Place.ADMITTED
    world.encode = 0.0
    behind, _ = a.arrive(1, 1, world.wish(True, 4.0), 100.0)
    assert behind.place is Place.WAITING, "nobody asks for less urgent media before it is their turn"
    assert a.promote(100.0) == [parked]
    assert a.promote(100.0) == [behind], "one at a time: what the first takes is foreseen then"


def test_text_goes_on_before_parked_media_that_are_more_urgent() -> None:
    world, a = World(encode=5.0), admission(1)
    running, _ = a.arrive(0, 1, None, 100.0)
    media, _ = a.arrive(0, 1, world.wish(True, 4.0), 100.0)
    text, _ = a.arrive(1, 1, world.wish(False, 4.0), 100.0)
    assert (media.place, text.place) == (Place.WAITING, Place.WAITING), "both for a place"
    assert a.leave(running, 100.0) == [text] and media.parked is Stage.ENCODE


def test_who_waits_for_prefill_holds_back_everybody_behind() -> None:
    world, a = World(prefill=5.0), admission(10)
    parked, _ = a.arrive(0, 1, world.wish(True, 4.0), 100.0)
    lax, _ = a.arrive(1, 1, world.wish(False, 60.0), 100.0)
    assert lax.place is Place.WAITING, "it would take the engines that a more urgent one waits for"
    assert a.arrive(-1, 1, world.wish(False, 60.0), 100.0)[0].place is Place.ADMITTED
    world.prefill = 0.0
    assert (a.promote(100.0), a.promote(100.0)) == ([parked], [lax])


def test_among_equals_the_earliest_deadline_goes_first() -> None:
    world, a = World(prefill=9.0), admission(10, queue=9)
    wishes = {first: a.arrive(0, 1, world.wish(False, first), 100.0)[0] for first in (5.0, 3.0, 4.0)}
    urgent, _ = a.arrive(-1, 1, world.wish(False, 8.0), 100.0)
    world.prefill = 0.0
    order = [a.promote(100.0) for _ in range(4)]
    assert order == [[urgent], [wishes[3.0]], [wishes[4.0]], [wishes[5.0]]]


def test_a_full_queue_sheds_the_least_urgent_and_media_where_encoders_are_short() -> None:
    world, a = World(encode=9.0, prefill=8.0), admission(10, queue=3)
    first, _ = a.arrive(0, 1, world.wish(True, 5.0), 100.0)
    text, _ = a.arrive(0, 1, world.wish(False, 5.0), 100.0)
    media, _ = a.arrive(0, 1, world.wish(True, 5.0), 100.0)
    assert (first.parked, text.parked) == (Stage.ENCODE, Stage.PREFILL)
    another, pushed = a.arrive(0, 1, world.wish(False, 5.0), 100.0)
    assert pushed is media and another.place is Place.WAITING, "as urgent, but it wants no encoder"
    with pytest.raises(Overloaded):
        a.arrive(0, 1, world.wish(True, 5.0), 100.0)
    urgent, pushed = a.arrive(-1, 1, world.wish(True, 5.0), 100.0)
    assert pushed is first and urgent.place is Place.WAITING


def test_media_wait_for_room_for_their_embeddings_and_text_does_not() -> None:
    world, a = World(room=False), admission(10)
    entry, _ = a.arrive(0, 1, world.wish(True), 100.0)
    assert (entry.place, entry.parked, a.wishing) == (Place.WAITING, Stage.ENCODE, True)
    assert a.arrive(0, 1, None, 100.0)[0].place is Place.ADMITTED
    world.room = True
    assert a.promote(200.0) == [entry] and not a.wishing


WORLDS = st.builds(World, st.floats(0, 6), st.floats(0, 6), st.sampled_from([0.01, 0.1]), st.booleans())
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(-1, 1), st.booleans(), st.sampled_from([None, 0.5, 2.0, 5.0, inf])),
        st.tuples(st.just("leave"), st.integers(0, 50), st.just(False), st.none()),
        st.tuples(st.just("world"), WORLDS, st.just(False), st.none()),
        st.tuples(st.just("later"), st.integers(0, 2), st.just(False), st.none()),
    ),
    max_size=60,
)


@given(MOVES)
def test_whatever_happens_wishes_are_kept_and_nobody_is_passed_by_those_who_need_the_same(moves: list[Any]) -> None:
    world, a, now = World(), admission(requests=4, nbytes=1000, queue=5), 100.0
    entries: list[Entry] = []

    def check(admitted: list[Entry]) -> None:
        assert sum(entry.wish is not None for entry in admitted) <= 1
        for entry in admitted:
            assert entry.place is Place.ADMITTED
            if entry.wish is not None:
                outlook = entry.wish.foresee()
                assert outlook.room and outlook.pace <= max(entry.wish.pace, 0.0105)
                assert now + outlook.first <= entry.deadline or outlook.first <= 1.05
            passed = [other for other in entries if other.place is Place.WAITING and other < entry]
            if passed:
                assert all(other.media for other in passed) and not entry.media
                assert min(passed).parked is Stage.ENCODE, "the others wait behind it"

    for what, number, media, first in moves:
        if what == "arrive":
            wish = None if first is None else world.wish(media, first, 0.05 if first == 2.0 else inf)
            try:
                entry, pushed = a.arrive(number, 1, wish, now)
            except TooLate:
                assert wish is not None and (wish.first <= 1.0 or first is not None)
                continue
            except Overloaded:
                assert a.waiting == 5
                continue
            entries.append(entry)
            check([entry] if entry.place is Place.ADMITTED else [])
            assert pushed is None or (pushed.place is Place.REFUSED and pushed.priority >= number)
        elif what == "leave" and entries:
            check(a.leave(entries.pop(number % len(entries)), now))
        elif what == "world":
            world.__dict__.update(number.__dict__)
            check(a.promote(now))
        elif what == "later":
            now += number
            check(a.promote(now))
        inside = [entry for entry in entries if entry.place is Place.ADMITTED]
        waiting = [entry for entry in entries if entry.place is Place.WAITING]
        assert (a.requests, a.waiting) == (len(inside), len(waiting))
        assert a.requests <= 4 and a.waiting <= 5
        if waiting and not a.promote(now) and a.requests < 4:
            assert min(waiting).parked is not None, "nobody waits for nothing"
    for entry in entries:
        a.leave(entry, now)
    assert (a.requests, a.nbytes, a.waiting) == (0, 0, 0)


def test_without_a_queue_nobody_waits_and_nobody_is_pushed_out() -> None:
    a = admission(requests=1, queue=0)
    running, _ = a.arrive(0, 1)
    with pytest.raises(Overloaded):
        a.arrive(-1, 1)
    a.leave(running)
    assert a.arrive(0, 1)[0].place is Place.ADMITTED
