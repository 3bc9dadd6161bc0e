"""Embeddings on their way, against a naive count."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.planning.freight import Cargo, Freight


def test_who_is_at_its_bound_has_no_room_but_for_what_is_alone() -> None:
    freight = Freight(100)
    assert not freight.full(1000), "one request alone may have more"
    first = freight.send("a", 60)
    assert (freight.full(40), freight.full(41), freight.full(0)) == (set(), {"a"}, ())
    second = freight.send("a", 1000)
    first.close()
    first.close()
    assert (freight.underway("a"), freight.underway("b")) == (1000, 0)
    assert freight.full(1) == {"a"}
    second.close()
    assert repr(freight) == "<Freight {}>"


def test_without_a_bound_everybody_has_room() -> None:
    freight = Freight()
    freight.send("a", 1 << 40)
    assert not freight.full(1 << 40)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans())))
def test_it_is_the_sum_of_what_has_not_arrived(steps: list[tuple[str, int, bool]]) -> None:
    freight, naive, open_ = Freight(60), Counter[str](), list[tuple[str, int, Cargo]]()
    for url, nbytes, arrives in steps:
        if arrives and open_:
            where, count, cargo = open_.pop(0)
            cargo.close()
            naive[where] -= count
        else:
            open_.append((url, nbytes, freight.send(url, nbytes)))
            naive[url] += nbytes
        assert {name: freight.underway(name) for name in "abc"} == {name: naive[name] for name in "abc"}
        assert set(freight.full(20)) == {name for name in "abc" if naive[name] > 40}
