"""How decodes are grouped. What comes out of it is `test_attention`'s."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.language import gathering
from engines.language.gathering import groups
from tests.support.paged import MIXES, Bench


def test_small_gathers_give_the_same(monkeypatch):
    monkeypatch.setitem(gathering.GATHER_NBYTES, "cpu", 1)
    found, expected = Bench(MIXES["unequal decodes"]).run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


counts = st.lists(st.integers(1, 500), max_size=40).map(lambda found: sorted(found, reverse=True))


@given(counts, st.integers(1, 2000))
def test_groups_cover_all_and_waste_little(counts, limit):
    cuts = list(groups(counts, limit))
    assert [index for a, b in cuts for index in range(a, b)] == list(range(len(counts)))
    for first, last in cuts:
        padded = (last - first) * counts[first]
        assert last - first == 1 or padded <= limit
        assert padded <= max(2 * sum(counts[first:last]), gathering.SMALL_GROUP_BLOCKS * (last - first))
