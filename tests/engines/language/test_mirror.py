"""What is copied between a cache and its mirror, and when: lanes that are late show who waits."""

from __future__ import annotations

import pytest
import torch

from engines.language import mirror
from engines.language.mirror import Direct, Mirror, SideStream, lane_of
from tests.support.cuda import Cuda
from tests.support.lanes import Late


def test_the_host_needs_no_stream() -> None:
    assert isinstance(lane_of(torch.device("cpu")), Direct)


def test_neighbours_are_one_copy_per_layer() -> None:
    target, source = torch.zeros(3, 8, 2), torch.arange(54.0).view(3, 9, 2)
    found = list(mirror.moves(target, source, range(1, 3), [(4, 2), (0, 1)]))
    assert [tuple(part.shape) for part, _ in found] == [(2, 2), (1, 2)] * 2
    for to, come in found:
        assert to.is_contiguous()
        assert come.is_contiguous()
        to.copy_(come)
    assert torch.equal(target[1:, [0, 4, 5]], source[1:, [0, 4, 5]])
    assert not target[0].any()
    assert not target[:, [1, 2, 3, 6, 7]].any()


def test_staged_blocks_are_there_for_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "lane_of", Late)
    pool, host = torch.ones(2, 4, 3), torch.zeros(2, 3, 3)
    one = Mirror(pool, host)
    ready = one.stage(range(2), [(1, 2)])
    assert not host.any()
    ready()
    ready()
    assert torch.equal(host[:, 1:], pool[:, 1:3])
    assert not host[:, 0].any()


def test_loaded_blocks_are_there_for_what_runs_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "lane_of", Late)
    pool, host = torch.zeros(2, 4, 3), torch.ones(2, 3, 3)
    Mirror(pool, host).load([(0, 1)])
    assert torch.equal(pool[:, 0], host[:, 0])
    assert not pool[:, 1:].any()


def test_a_stream_copies_behind_the_model_and_the_model_goes_on_behind_what_comes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    cuda.replace(monkeypatch)
    monkeypatch.setattr(mirror, "lane_of", SideStream)
    pool, host = torch.ones(2, 4, 3), torch.zeros(2, 3, 3)
    one = Mirror(pool, host)
    ready = one.stage(range(1), [(0, 2)])
    assert cuda.told == ["side1 waits for default", "side1 records event(blocking=True)"]
    assert torch.equal(host[0, :2], pool[0, :2])
    ready()
    assert cuda.told.pop() == "the host waits for event(blocking=True)"
    one.load([(2, 1)])
    assert cuda.told[2:] == [
        "side2 waits for default",
        "side2 records event(blocking=True)",
        "default waits for event(blocking=True)",
    ]
    assert not pool[:, 2].any()


def test_copies_are_queued_on_their_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen = Cuda(), list[str]()
    cuda.replace(monkeypatch)
    moves = ((torch.zeros(1), seen.append(cuda.current) or torch.ones(1)) for _ in range(2))
    SideStream(torch.device("cuda:0")).copy(moves)
    assert seen == ["side1"] * 2
    assert cuda.current == "default"
