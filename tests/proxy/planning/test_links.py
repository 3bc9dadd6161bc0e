"""Labels of instances, and the rates between them."""

from __future__ import annotations

import pytest

from proxy.core import BOTH, Instance
from proxy.planning.links import Links, Place, labels

LINKS = Links(host=8.0, rack=4.0, zone=2.0, other=1.0)


@pytest.mark.parametrize(
    ("one", "other", "rate"),
    [
        (Place(), Place(), 1.0),
        (Place(host="a"), Place(host="a"), 8.0),
        (Place(host="a"), Place(host="b"), 1.0),
        (Place(rack="r", host="a"), Place(rack="r", host="b"), 4.0),
        (Place(rack="r", host="a"), Place(rack="s", host="a"), 1.0),
        (Place("z", "r", "a"), Place("y", "r", "a"), 1.0),
        (Place("z", "r", "a"), Place("z", "s", "a"), 2.0),
        (Place("z", "", "a"), Place("z", "s", "a"), 8.0),
        (Place("z"), Place(), 1.0),
    ],
)
def test_the_nearest_label_that_both_have_tells_the_rate(one: Place, other: Place, rate: float) -> None:
    assert LINKS.rate(one, other) == LINKS.rate(other, one) == rate


def test_a_place_is_what_the_facts_say() -> None:
    told = Instance("http://a", BOTH, "native", facts={"labels": {"rack": "r", "host": "h"}})
    assert Place.of(told) == Place(rack="r", host="h")
    assert Place.of(Instance("http://b", BOTH, "native")) == Place()


def test_rates_are_read_and_the_others_stay() -> None:
    assert Links.parse("") == Links()
    assert Links.parse("host=1e9, other=5") == Links(host=1e9, other=5.0)


@pytest.mark.parametrize("text", ["moon=1", "host", "host=", "host=fast", "host=0", "host=-1", "host=nan", "host=inf"])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Links.parse(text)


@pytest.mark.parametrize("given", [{"moon": "x"}, {"host": ""}, {"host": 3}, {"rack": None}])
def test_labels_that_are_none_are_refused(given: dict[str, object]) -> None:
    assert labels({"host": "h", "zone": "z"}) == {"host": "h", "zone": "z"}
    with pytest.raises(ValueError, match="an instance's labels are zone, rack, host"):
        labels(given)
