import pytest

from bench.simulator.links import PICKLED, RDMA, Link, everywhere


def test_every_rank_takes_a_copy_one_after_the_other() -> None:
    assert Link(1e-9).seconds(2_000_000, 4) == pytest.approx(8e-3)
    assert PICKLED.seconds(1_000_000, 1) / RDMA.seconds(1_000_000, 1) > 30


def test_one_link_for_all() -> None:
    assert everywhere(RDMA)("http://a", "http://b") is RDMA
