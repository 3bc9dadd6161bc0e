"""The table of heartbeats, as two workers see it."""

from __future__ import annotations

import pytest

from proxy.joining import heartbeats
from proxy.joining.heartbeats import ROWS, SIZE, Heartbeats

URL = "http://h:1"


def views() -> tuple[Heartbeats, Heartbeats]:
    memory = bytearray(SIZE)
    return Heartbeats(memory), Heartbeats(memory)


def test_what_one_worker_hears_every_worker_knows() -> None:
    one, other = views()
    assert other.until(URL) is None and not other.knows(URL, "first life")
    one.beat(URL, "first life", 12.5)
    assert other.until(URL) == 12.5
    assert other.late(12.5) and not other.late(12.0)
    assert other.knows(URL, "first life") and not other.knows(URL, "second life")
    other.beat(URL, "second life", 20.0)
    assert one.until(URL) == 20.0 and one.knows(URL, "second life")
    assert repr(one) == "<Heartbeats of 1>"
    one.forget(URL)
    one.forget(URL)
    assert other.until(URL) is None and not other.late(99.0)


def test_a_row_is_given_to_the_next_when_nobody_has_it() -> None:
    table = heartbeats.alone()
    for number in range(ROWS):
        table.beat(f"http://h:{number}", "", 1.0)
    with pytest.raises(LookupError, match=f"{ROWS} registered engines"):
        table.beat("http://one.more:1", "", 1.0)
    table.beat(URL, "", 2.0)
    table.forget(URL)
    table.beat("http://one.more:1", "", 3.0)
    assert table.until("http://one.more:1") == 3.0 and table.until("http://h:2") == 1.0
