"""Paged attention against attention written out over plain keys and values, for each backend."""

from __future__ import annotations

import pytest
import torch

from engines.language.attention import Query
from engines.language.gathering import Gathering
from engines.language.varlen import Varlen
from tests.support.kernels import varlen_attn
from tests.support.paged import MIXES, Bench, new_cache

BACKENDS = {"gathering": Gathering, "varlen": lambda cache: Varlen(cache, varlen_attn)}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("spans", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_it_equals_plain_attention(spans, block_size, backend):
    found, expected = Bench(spans, block_size, backend).run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_in_the_last_layer_the_last_row_of_each_sequence_counts(spans, backend):
    found, expected = Bench(spans, backend=backend).run(layer=2)
    last = torch.tensor([count for _, count in spans]).cumsum(0) - 1
    torch.testing.assert_close(found[last], expected[last], rtol=1e-5, atol=1e-5)
    others = [row for row in range(len(found)) if row not in last]
    assert not found[others].any()


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_table_too_short_is_told_before_anything_is_written(backend):
    cache = new_cache()
    with pytest.raises(IndexError, match="2 blocks of 4 cannot hold 9 tokens"):
        backend(cache).plan([Query([3, 4], 0, 9)], lambda layer: None)
