"""When a second attempt begins."""

import pytest

from proxy.hedge import Hedge


def test_never_or_after_fixed_seconds() -> None:
    assert Hedge("").delay() is None
    hedge = Hedge("0.5")
    for _ in range(100):
        hedge.observe(9.0)
    assert hedge.delay() == 0.5


def test_a_percentile_of_what_was_seen_once_that_is_enough() -> None:
    hedge = Hedge("p95")
    for number in range(19):
        hedge.observe(float(number))
    assert hedge.delay() is None
    for number in range(19, 100):
        hedge.observe(float(number))
    assert hedge.delay() == 95.0
    for _ in range(300):
        hedge.observe(1.0)
    assert hedge.delay() == 1.0, "the old is forgotten"


@pytest.mark.parametrize("text", ["p", "p100", "0", "-1", "soon", "inf", "nan"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither seconds"):
        Hedge(text)
