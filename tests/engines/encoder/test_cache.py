"""The cache's bookkeeping: every transition, the order of eviction, and that no byte is lost or given twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.encoder.cache import TRANSITIONS, EmbeddingCache, Entry, State
from engines.ranges import ALIGNMENT

UNIT = ALIGNMENT


def put(cache: EmbeddingCache, key: str, units: int = 1, held_until: float = 0.0) -> Entry:
    entry = cache.reserve(key, units * UNIT)
    assert entry is not None
    cache.commit(entry, value=key, held_until=held_until)
    return entry


@pytest.mark.parametrize(("start", "end"), list(itertools.product(State, State)))
def test_only_the_transitions_of_the_table_are_possible(start: State, end: State) -> None:
    entry = Entry("k", 0, UNIT, state=start)
    if end in TRANSITIONS[start]:
        entry.move(end)
        assert entry.state is end
    else:
        with pytest.raises(ValueError, match=f"from {start.value} to {end.value}"):
            entry.move(end)
        assert entry.state is start


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = EmbeddingCache(3 * UNIT)
    for key in "abc":
        put(cache, key)
    assert cache.find("a") is not None
    assert cache.reserve("d", UNIT) is None
    victim = cache.evict(now=1.0)
    assert victim is not None
    assert (victim.key, victim.state) == ("b", State.LEAVING)
    assert cache.find("b") is None
    assert cache.reserve("d", UNIT) is None, "a transfer may still read the range"
    cache.freed(victim)
    assert cache.reserve("d", UNIT) is not None
    cache.check()


def test_pinned_and_held_entries_stay() -> None:
    cache = EmbeddingCache(2 * UNIT)
    pinned, held = put(cache, "pinned"), put(cache, "held", held_until=10.0)
    assert cache.pin(pinned)
    assert cache.evict(now=5.0) is None
    assert cache.info(now=5.0)["pinned"] == 2
    cache.named(pinned, 8.0)
    cache.unpin(pinned)
    assert cache.evict(now=5.0) is None
    assert cache.evict(now=9.0) is pinned
    assert cache.evict(now=9.0) is None
    assert cache.evict(now=10.0) is held


def test_what_is_brought_is_not_held_unless_others_were_told_of_it() -> None:
    cache = EmbeddingCache(2 * UNIT)
    brought, named = put(cache, "a", held_until=10.0), put(cache, "b", held_until=10.0)
    cache.named(named, 9.0)
    for entry in (brought, named):
        cache.not_named(entry)
    assert brought.evictable(0.0) and not named.evictable(0.0)


def test_a_hold_is_only_ever_extended() -> None:
    cache = EmbeddingCache(UNIT)
    entry = put(cache, "a", held_until=10.0)
    assert cache.pin(entry)
    cache.unpin(entry)
    assert entry.held_until == 10.0


def test_a_hold_may_begin_before_the_embedding_is_there() -> None:
    cache = EmbeddingCache(UNIT)
    entry = cache.reserve("a", UNIT)
    assert entry is not None
    cache.named(entry, 10.0)
    cache.commit(entry, None, held_until=0.0)
    assert cache.evict(now=9.0) is None
    cache.was_read(entry)
    assert cache.evict(now=9.0) is entry


def test_the_last_promised_reader_ends_the_hold() -> None:
    cache = EmbeddingCache(UNIT)
    entry = put(cache, "a")
    for _ in range(2):
        cache.named(entry, 10.0)
    cache.was_read(entry)
    assert cache.evict(now=5.0) is None, "another answer named it, and its reader has not come"
    cache.was_read(entry)
    cache.was_read(entry)
    assert cache.evict(now=5.0) is entry


def test_an_entry_that_left_cannot_be_pinned() -> None:
    cache = EmbeddingCache(UNIT)
    entry = put(cache, "a")
    assert cache.evict(now=0.0) is entry
    assert not cache.pin(entry)
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin(entry)


def test_an_abandoned_entry_was_never_there() -> None:
    cache = EmbeddingCache(UNIT)
    entry = cache.reserve("a", UNIT)
    assert entry is not None
    assert cache.find("a") is None
    cache.abandon(entry)
    assert repr(cache) == "<EmbeddingCache 0 ready, 0 filling, 0 leaving, 64/64 bytes free>"


def test_one_key_is_cached_once() -> None:
    cache = EmbeddingCache(2 * UNIT)
    put(cache, "a")
    again = cache.reserve("a", UNIT)
    assert again is not None
    with pytest.raises(ValueError, match="cached already"):
        cache.commit(again, None, 0.0)
    cache.abandon(again)
    cache.check()


def test_settling_counts_on_recent_departures_only() -> None:
    cache = EmbeddingCache(2 * UNIT)
    put(cache, "a")
    put(cache, "b")
    assert not cache.settling(UNIT, now=0.0)
    cache.evict(now=0.0)
    assert cache.settling(UNIT, now=0.5)
    assert not cache.settling(2 * UNIT, now=0.5), "one unit is not enough"
    assert not cache.settling(UNIT, now=5.0), "its reader may be stopped for good"


@pytest.mark.parametrize(("nbytes", "fits"), [(1, True), (2 * UNIT, True), (2 * UNIT + 1, False)])
def test_what_can_never_fit_is_known(nbytes: int, fits: bool) -> None:
    assert EmbeddingCache(2 * UNIT + 1).fits(nbytes) is fits


class CacheMachine(RuleBasedStateMachine):
    """Any order of operations keeps the books straight."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = EmbeddingCache(16 * UNIT)
        self.now = 0.0
        self.serial = itertools.count()
        self.filling: list[Entry] = []
        self.pinned: list[Entry] = []
        self.leaving: list[Entry] = []
        self.ready: list[Entry] = []

    @rule(units=st.integers(1, 8))
    def reserve(self, units: int) -> None:
        entry = self.cache.reserve(str(next(self.serial)), units * UNIT - 1)
        if entry is not None:
            self.filling.append(entry)

    @precondition(lambda self: self.filling)
    @rule(abandon=st.booleans(), hold=st.floats(0, 3))
    def settle(self, abandon: bool, hold: float) -> None:
        entry = self.filling.pop()
        if abandon:
            self.cache.abandon(entry)
        else:
            self.cache.commit(entry, None, self.now + hold)
            self.ready.append(entry)

    @precondition(lambda self: self.ready)
    @rule(index=st.integers(0, 15))
    def pin(self, index: int) -> None:
        entry = self.ready[index % len(self.ready)]
        assert self.cache.pin(entry)
        self.pinned.append(entry)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.cache.unpin(self.pinned.pop(0))

    @rule()
    def evict(self) -> None:
        victim = self.cache.evict(self.now)
        if victim is None:
            assert all(entry in self.pinned or entry.held_until > self.now for entry in self.ready)
            return
        assert victim not in self.pinned
        self.ready.remove(victim)
        self.leaving.append(victim)

    @precondition(lambda self: self.leaving)
    @rule()
    def freed(self) -> None:
        self.cache.freed(self.leaving.pop())

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def books_are_straight(self) -> None:
        self.cache.check()
        info = self.cache.info(self.now)
        assert (info["items"], info["filling"], info["leaving"]) == (
            len(self.ready),
            len(self.filling),
            len(self.leaving),
        )


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
