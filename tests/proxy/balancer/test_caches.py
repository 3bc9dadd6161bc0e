"""Who holds what, against lists that are searched; and who is at it right now."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.balancer.caches import HIT, Holders, hit
from tests.support.balancing import pool

URLS, KEYS = "abc", "uvwxyz"
CAPACITY = 100


class AgainstLists(RuleBasedStateMachine):
    """By URL a list of (key, tokens), the latest used last."""

    def __init__(self) -> None:
        super().__init__()
        self.holders = Holders()
        self.lists: dict[str, list[tuple[str, int]]] = {url: [] for url in URLS}

    def drop(self, url: str, key: str) -> list[tuple[str, int]]:
        dropped = [item for item in self.lists[url] if item[0] == key]
        self.lists[url] = [item for item in self.lists[url] if item[0] != key]
        return dropped

    @rule(url=st.sampled_from(URLS), key=st.sampled_from(KEYS), work=st.integers(1, 120))
    def placed(self, url: str, key: str, work: int) -> None:
        before = self.drop(url, key)
        assert self.holders.placed(url, key, work, CAPACITY) is bool(before)
        self.lists[url].append((key, work))
        while sum(tokens for _, tokens in self.lists[url]) > CAPACITY:
            self.lists[url].pop(0)

    @rule(url=st.sampled_from(URLS), key=st.sampled_from(KEYS), held=st.booleans())
    def told(self, url: str, key: str, held: bool) -> None:
        self.holders.told(url, key, held)
        dropped = self.drop(url, key)
        self.lists[url] += dropped if held else []

    @rule(url=st.sampled_from(URLS))
    def forget(self, url: str) -> None:
        self.holders.forget(url)
        self.lists[url] = []

    @invariant()
    def they_agree(self) -> None:
        for key in KEYS:
            wanted = {url for url in URLS if key in dict(self.lists[url])}
            assert set(self.holders.holders(key)) == wanted
            assert self.holders.held(key, 64) == dict.fromkeys(wanted, 64 // HIT)
        assert [self.holders.count(url) for url in URLS] == [len(self.lists[url]) for url in URLS]
        tokens = {url: sum(tokens for _, tokens in items) for url, items in self.lists.items()}
        assert {url: count for url, count in self.holders._tokens.items() if count} == {
            url: count for url, count in tokens.items() if count
        }


AgainstLists.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstLists = AgainstLists.TestCase


class Flights(RuleBasedStateMachine):
    """A key is in flight where more has begun than ended."""

    def __init__(self) -> None:
        super().__init__()
        self.holders = Holders()
        self.open: list[tuple[str, str]] = []
        self.ends: list[object] = []

    @rule(url=st.sampled_from(URLS), key=st.sampled_from(KEYS))
    def begin(self, url: str, key: str) -> None:
        self.ends.append(self.holders.began(url, key))
        self.open.append((url, key))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.open) - 1))
        self.open.pop(number)
        self.ends.pop(number)()

    @rule(url=st.sampled_from(URLS))
    def forget(self, url: str) -> None:
        """What is held goes; what runs there runs on."""
        self.holders.forget(url)

    @invariant()
    def they_agree(self) -> None:
        for url in URLS:
            for key in KEYS:
                assert (self.holders.flying(key, pool(url)) == url) is ((url, key) in self.open)
        assert len(self.holders._flights) == len({key for _, key in self.open})


Flights.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestFlights = Flights.TestCase


@given(st.integers(1, 10**9))
def test_a_hit_is_work_but_little(work: int) -> None:
    assert 1 <= hit(work) <= max(1, work / HIT)


def test_a_choice_is_told_of_the_latest_holders_only() -> None:
    holders = Holders()
    for number in range(40):
        holders.placed(f"{number}", "cat", 320)
    holders.told("3", "cat", True)
    holders.placed("5", "cat", 320)
    assert len(holders.holders("cat")) == 40
    assert [*holders.held("cat", 320)] == ["5", *(f"{number}" for number in range(39, 24, -1))]
    assert repr(holders).startswith("<Holders of 1 items, 0 in flight, {'0': 320, ")
