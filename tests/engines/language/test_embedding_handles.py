from __future__ import annotations

from engines.language.embedding_handles import Stretch, in_order, whole
from engines.language.sequence import Item

A = Item("a", "image", (1, 2, 8), 3, 4)
AGAIN = Item("a", "image", (1, 2, 8), 20, 4)
FRAMES = [Item("v", "video", (1, 2, 4), 8 + 4 * n, 2, row=2 * n, rows=4) for n in range(2)]


def test_as_a_whole_an_embedding_is_wanted_once_until_its_last_place() -> None:
    assert whole([A, *FRAMES, AGAIN]) == [
        Stretch("a", (0, 3), 0, 4, at=3, until=24, more=False),
        Stretch("v", (1, 2), 0, 4, at=8, until=14, more=False),
    ]


def test_in_order_an_embedding_is_wanted_in_every_place() -> None:
    assert in_order([A, *FRAMES, AGAIN]) == [
        Stretch("a", (0,), 0, 4, at=3, until=7, more=True),
        Stretch("v", (1,), 0, 2, at=8, until=10, more=True),
        Stretch("v", (2,), 2, 4, at=12, until=14, more=False),
        Stretch("a", (3,), 0, 4, at=20, until=24, more=False),
    ]


def test_a_stretch_is_cut_where_its_rows_stand() -> None:
    frame = in_order(FRAMES)[1]
    assert frame.cut(2, 3) == Stretch("v", (1,), 2, 3, at=12, until=13, more=True)
    assert frame.cut(3, 4) == Stretch("v", (1,), 3, 4, at=13, until=14, more=False)
    shown_twice = whole([A, AGAIN])[0]
    assert shown_twice.cut(0, 4) == shown_twice


def test_rows_that_are_computed_are_skipped() -> None:
    frame = in_order(FRAMES)[1]
    assert [frame.next(2, computed) for computed in (0, 12, 13, 14, 99)] == [2, 2, 3, 4, 4]
    assert frame.next(3, 12) == 3
    assert whole([A, AGAIN])[0].next(0, 10) == 0
