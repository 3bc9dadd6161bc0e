from hypothesis import strategies as st

from bench.fuzzing.nearly import ODD, maybe, some
from tests.support.drawing import drawn


def test_odd_values_are_of_every_type() -> None:
    assert {type(value) for value in drawn(ODD)} >= {type(None), bool, int, float, str, list, dict}


def test_what_is_nearly_right_is_mostly_so() -> None:
    found = [type(value) is tuple for value in drawn(maybe(st.tuples(st.integers())))]
    assert len(found) / 2 < sum(found) < len(found)


def test_objects_have_some_of_their_fields() -> None:
    found = [value for value in drawn(some(a=st.just(1), b=st.just(2))) if isinstance(value, dict)]
    assert {frozenset(value) for value in found} == {frozenset(), frozenset("a"), frozenset("b"), frozenset("ab")}
