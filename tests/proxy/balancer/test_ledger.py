"""Load enters with a lease and leaves with it, against a naive reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.balancer.board import ROWS, Board, size
from proxy.balancer.ledger import Lease, Ledger
from proxy.core import Instance, Role
from tests.support.balancing import pool

INSTANCES = [Instance(f"http://h:{port}", role, "native") for port, role in enumerate(Role)]


@given(st.lists(st.one_of(st.tuples(st.integers(0, 2), st.integers(1, 99)), st.integers(0, 30))))
def test_loads_are_the_sums_of_open_leases(steps: list[tuple[int, int] | int]) -> None:
    told: dict[str, int] = {}
    ledger = Ledger(dict.fromkeys(Role, lambda url, standing: told.__setitem__(url, standing.load)))
    leases: list[Lease] = []
    open_: dict[int, tuple[str, int]] = {}
    for step in steps:
        if isinstance(step, tuple):
            instance = INSTANCES[step[0]]
            open_[len(leases)] = (instance.url, step[1])
            leases.append(ledger.lease(instance, instance.role, step[1]))
        elif step < len(leases):
            leases[step].close()  # often a second time
            open_.pop(step, None)
        ledger.check()
        for instance in INSTANCES:
            expected = sum(tokens for url, tokens in open_.values() if url == instance.url)
            assert ledger.load(instance.url) == told.get(instance.url, 0) == expected
        assert ledger.leases() == len(open_)
    for lease in leases:
        lease.close()
    assert repr(ledger) == "<Ledger 0 leases, {}>"


def test_a_lease_is_returned_by_its_with_whatever_happens() -> None:
    ledger = Ledger({})
    with pytest.raises(KeyError), ledger.lease(INSTANCES[0], Role.ENCODE, 5) as lease:
        assert repr(lease) == "<Lease encode h:0 5>"
        assert ledger.leases(url="http://h:0") == ledger.leases(role=Role.ENCODE) == 1
        assert ledger.leases(role=Role.DECODE) == 0
        raise KeyError
    assert ledger.leases() == 0


def test_a_lease_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        Ledger({}).lease(INSTANCES[0], Role.ENCODE, 0)


def test_the_check_finds_a_leak() -> None:
    ledger = Ledger({})
    ledger.lease(INSTANCES[0], Role.ENCODE, 5)
    ledger._open.clear()
    with pytest.raises(AssertionError, match="not the sums"):
        ledger.check()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_is_read_at_once_and_rightly_when_its_rows_have_gone_to_others(workers: int) -> None:
    boards = [Board(buffer, workers, worker) for buffer in [bytearray(size(workers))] for worker in range(workers)]
    ledger, other = Ledger({}, boards[0]), Ledger({}, boards[-1])
    assert ledger.shared is (workers > 1)
    two = pool(["http://a", "http://b"], Role.ENCODE)
    assert [one(two).tolist() for one in (ledger.loads, ledger.running, ledger.used)] == [[0, 0]] * 3
    for number in range(ROWS):  # which are more than are free
        other.standing(f"http://{number}")
    b = other.lease(two.by_url["http://b"], Role.ENCODE, 7)
    with ledger.lease(two.by_url["http://a"], Role.ENCODE, 5), other.lease(two.by_url["http://b"], Role.ENCODE, 1):
        assert ledger.loads(two).tolist() == [5, 8]
        assert ledger.running(two).tolist() == [1, 2]
        assert ledger.used(two).tolist() == [2, 3]
    b.close()
    assert ledger.loads(two).tolist() == [0, 0]


def test_what_ends_with_a_lease_ends_once() -> None:
    ended: list[int] = []
    lease = Ledger({}).lease(INSTANCES[0], Role.ENCODE, 5)
    lease.also = lambda: ended.append(1)
    lease.close()
    lease.close()
    assert ended == [1]
