from __future__ import annotations

import pytest
import torch

from engines.language.embedding_handles import Stretch
from engines.language.embedding_rows import Embeddings, Rows

WHOLE = torch.arange(20.0).view(10, 2)


class Source:
    """Counts its releases."""

    def __init__(self) -> None:
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


def test_rows_are_sliced_like_their_tensor_over_parts_in_any_order() -> None:
    rows = Rows((10, 2)).plus([(6, WHOLE[6:])]).plus([(0, WHOLE[:3]), (3, WHOLE[3:6])])
    for begin in range(10):
        for end in range(begin + 1, 11):
            assert torch.equal(rows[begin:end], WHOLE[begin:end])
    assert rows[3:6].data_ptr() == WHOLE[3:].data_ptr(), "a view"


def test_a_row_that_is_not_here_is_an_error() -> None:
    rows = Rows((10, 2)).plus([(0, WHOLE[:3]), (4, WHOLE[4:])])
    with pytest.raises(LookupError, match="row 3 is not here"):
        rows[2:6]
    with pytest.raises(LookupError, match="row 0 is not here"):
        rows.minus(0, 1)[0:1]
    assert torch.equal(rows.minus(0, 4)[4:10], WHOLE[4:])


def test_what_is_to_come_first_is_missing() -> None:
    changes: list[int] = []
    held = Embeddings(2, lambda: changes.append(held.computed))
    early, late, rest = Source(), Source(), Stretch("b", (1,), 2, 10, at=22, until=30, more=False)
    held.expect(rest, rest.at)
    held.keep(late, Stretch("b", (1,), 0, 2, at=20, until=22, more=True))
    held.keep(early, Stretch("a", (0,), 0, 10, at=5, until=15, more=False))
    assert held.missing == 5
    held.add(late, (10, 2), [(0, WHOLE[:2])])
    assert held.missing == 5
    held.add(early, (10, 2), [(0, WHOLE)])
    assert held.missing == 22
    assert torch.equal(held.whole(0), WHOLE)
    with pytest.raises(LookupError, match="row 2 is not here"):
        held.whole(1)
    held.compute(15)
    assert (early.releases, late.releases) == (1, 0)
    assert held.rows[0] == Rows((10, 2))
    held.compute(30)
    assert held.missing is None
    held.release()
    held.release()
    assert (early.releases, late.releases) == (1, 1)
    assert changes == [15, 30, 30, 30]
    with pytest.raises(LookupError, match="no row of item 0"):
        held.whole(0)


def test_what_is_computed_before_it_came_is_not_kept() -> None:
    held, source = Embeddings(1), Source()
    held.keep(source, Stretch("a", (0,), 0, 10, at=0, until=10, more=False))
    held.compute(10)
    assert (held.keeps(source), held.missing, source.releases) == (False, None, 1)
