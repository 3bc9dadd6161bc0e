from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from engines.language.parallel.group import Alone, Processes
from tests.support.threads import on_ranks


def part(rank: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_has_the_same_bits_on_every_rank_whatever_else_is_added(size: int) -> None:
    alone = on_ranks(size, lambda group: group.sum(part(group.rank)[2:3]))
    together = on_ranks(size, lambda group: group.sum(part(group.rank)))
    wanted = part(0)
    for rank in range(1, size):
        wanted += part(rank)
    assert all(torch.equal(found, wanted) for found in together)
    assert all(torch.equal(found, wanted[2:3]) for found in alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gather_puts_the_ranks_side_by_side(dtype: torch.dtype) -> None:
    found = on_ranks(2, lambda group: group.gather(part(group.rank).to(dtype).t()))
    assert all(torch.equal(one, torch.cat([part(0).to(dtype).t(), part(1).to(dtype).t()], -1)) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rank_0_has_is_spread(dtype: torch.dtype) -> None:
    def work(group: Processes) -> torch.Tensor:
        whole = part(group.rank).to(dtype)
        group.spread(whole)
        return whole

    assert all(found.equal(part(0).to(dtype)) for found in on_ranks(3, work))


def test_a_rank_alone_changes_nothing() -> None:
    assert Alone().sum(part(0)).equal(part(0))
    assert Alone().gather(part(0)).equal(part(0))
    whole = part(0)
    Alone().spread(whole)
    assert whole.equal(part(0))


def test_a_rank_that_does_not_come_makes_the_others_raise() -> None:
    met = threading.Event()

    def work(group: Processes) -> str:
        if group.rank == 1:
            assert met.wait(10)
            return "went away"
        met.set()
        with pytest.raises(RuntimeError):
            group.sum(part(0))
        return "raised"

    assert on_ranks(2, work, timeout=2.0) == ["raised", "went away"]


def test_nobody_at_the_meeting_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        Processes(0, 2, timeout=0.2).connect(tmp_path / "meeting", torch.device("cpu"))
