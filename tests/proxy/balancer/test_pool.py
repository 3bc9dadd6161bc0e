"""Candidates: looked up, looked through, and narrowed."""

from __future__ import annotations

from weakref import ref

from proxy.balancer.pool import Pool
from tests.support.balancing import pool


def test_a_pool_is_its_urls_in_one_order_however_they_came() -> None:
    three = pool("cab")
    assert list(three) == [*three.urls] == ["a", "b", "c"] and len(three) == 3
    assert three.position == {"a": 0, "b": 1, "c": 2}
    assert "a" in three and "d" not in three
    assert three.by_url["b"].url == "b"
    assert repr(three) == "<Pool of 3>"
    assert not Pool([])


def test_without_some_it_is_another_pool_of_the_same_instances() -> None:
    three = pool("cab")
    fewer = three.without({"a", "d"})
    assert list(fewer) == ["b", "c"] and len(three) == 3
    assert fewer.by_url["b"] is three.by_url["b"]


def test_what_is_derived_of_a_pool_goes_with_it() -> None:
    one, same = pool("ab"), pool("ab")
    derived = {1}
    one.kept["deriver"] = derived
    known = ref(derived)
    assert one != same and "deriver" not in same.kept
    del derived, one
    assert known() is None


def test_weights_are_in_its_order_and_none_where_they_make_no_difference() -> None:
    weights = pool("cab", b=3.0).weights
    assert weights is not None and weights.tolist() == [1.0, 3.0, 1.0]
    assert pool("cab").weights is None and pool("ab", a=2.0, b=2.0).weights is None
