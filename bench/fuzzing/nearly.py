"""Strategies for what is nearly right: mostly as it should be, and at times a value of any other type."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Deferred, so that no strategy is written out in full where it is used: that text grows without bounds.
ODD: SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
        st.sampled_from([[], {}, [[]], [None], {"url": 1}, {"type": []}, "x" * 200, -1, 0, 1e300]),
    )
)


def maybe(right: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Right nine times out of ten; drawn from many numbers, as Hypothesis seldom draws the same twice."""
    return st.integers(0, 999).flatmap(lambda turn: right if turn < 900 else ODD)


def some(**fields: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """An object with any of these fields, nearly right each."""
    return st.fixed_dictionaries({}, optional={name: maybe(field) for name, field in fields.items()})
