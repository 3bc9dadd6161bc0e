"""Looks at media by offset, in a head and behind it."""

from __future__ import annotations

import pytest

from proxy.media.view import Short, View

WHOLE = bytes(range(100))


def test_bytes_come_from_the_head_and_from_behind_it() -> None:
    asked: list[tuple[int, int]] = []

    def more(start: int, count: int) -> bytes:
        asked.append((start, count))
        return WHOLE[start : start + count]

    view = View(WHOLE[:10], 100, more)
    assert (view.at(3, 4), view.big(0, 2), view.little(0, 2)) == (WHOLE[3:7], 1, 256)
    assert asked == [], "the head has them"
    assert view.at(8, 4) == WHOLE[8:12]
    assert view.some(95, 10) == WHOLE[95:]
    assert view.some(100, 10) == b"" and view.some(1 << 40, 8) == b""
    assert asked == [(8, 4), (95, 10)], "nobody is asked for what lies behind the end"


def test_what_is_not_there_is_missed() -> None:
    view = View(WHOLE[:10], 100, None)
    assert view.some(8, 4) == WHOLE[8:10]
    with pytest.raises(Short):
        view.at(8, 4)
