"""Cells that many write and all add up; and balancers in several processes that choose as one would."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy.balancer import POLICIES
from proxy.balancer.board import ROWS, Board, Standing, alone, size
from proxy.balancer.ledger import Lease, Ledger
from proxy.balancer.policy import Demand
from proxy.core import Instance, Role
from proxy.workers.segment import Segment
from tests.support.balancing import balancer, pool

PORTS = range(10)


def boards(workers: int) -> list[Board]:
    buffer = bytearray(size(workers))
    return [Board(buffer, workers, worker) for worker in range(workers)]


def test_totals_are_sums_and_the_last_use_is_the_latest() -> None:
    first, second = boards(2)
    row = first.row("a")
    assert second.row("a") == row != second.row("b")
    first.add(row, 1, 100, 2)
    second.add(row, 1, 11, 1)
    first.use(row)
    second.use(row)
    assert first.standing(row) == second.standing(row) == first.standing(1)._replace(used=2) == Standing(111, 2)
    assert first.leases(row) == first.leases(1) == 3
    assert (first.held(), second.held()) == ({1: (100, 2), row: (100, 2)}, {1: (11, 1), row: (11, 1)})
    assert repr(first) == "<Board worker 0 of 2, 2 rows>"


def test_what_a_dead_worker_held_is_given_back_and_its_turns_are_kept() -> None:
    first, second = boards(2)
    row = first.row("a")
    first.add(row, 1, 100, 2)
    second.add(row, 1, 11, 1)
    first.use(row)
    second.clear(0)
    assert second.standing(row) == Standing(11, 1)
    assert second.leases(row) == second.leases(1) == 1
    second.use(row)
    assert second.standing(row) == Standing(11, 2)


def test_a_row_that_is_given_away_is_noticed_by_who_knew_it() -> None:
    first, second = boards(2)
    row, given_away = first.row("early"), first.given_away
    for number in range(ROWS):  # more keys than rows: idle rows go on to others
        second.row(f"{number}")
    assert sum(1 for number in range(ROWS) if second.row(f"{number}") == row)
    assert first.given_away > given_away
    again = first.row("early")
    assert again == second.row("early")
    assert first.standing(again) == Standing(0, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_many_rows_are_read_as_one_is(workers: int) -> None:
    several, dice = boards(workers), random.Random(workers)
    keys = [f"{number}" for number in range(1200)]
    rows = several[-1].rows(keys)
    for _ in range(3000):
        board = dice.choice(several)
        row = board.row(dice.choice(keys))
        board.use(row)
        board.add(row, 1, dice.randint(1, 99), 1)
    one = several[0]
    assert [*zip(one.loads(rows).tolist(), one.used(rows).tolist(), strict=True)] == [
        one.standing(one.row(key)) for key in keys
    ]
    assert one.open_leases(rows).tolist() == [one.leases(one.row(key)) for key in keys]


def test_a_row_with_a_lease_is_never_given_away() -> None:
    board = alone()
    for number in range(ROWS - 8):
        board.add(board.row(f"{number}"), 1, 5, 1)
    with pytest.raises(LookupError, match="2040 instances"):
        board.row("one more")
    board.add(board.row("7"), 1, -5, -1)
    assert board.row("one more") not in {board.row(f"{number}") for number in range(7)}


def test_ledgers_of_two_workers_answer_for_both_and_check_their_own() -> None:
    one, other = (Ledger({}, board) for board in boards(2))
    instance = Instance("http://h:1", Role.DECODE, "native")
    with one.lease(instance, Role.DECODE, 5), other.lease(instance, Role.DECODE, 7):
        assert one.load(instance.url) == other.load(instance.url) == 12
        assert one.leases() == one.leases(url=instance.url) == one.leases(role=Role.DECODE) == 2
        assert one.leases(role=Role.PREFILL) == 0
        one.check()
        other.check()
    assert other.leases() == one.load(instance.url) == 0


class Voter:
    """A balancer in a process."""

    def __init__(self, segment: Segment, workers: int, worker: int, policy: str) -> None:
        self.taken = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.voter", *map(str, (segment.fd, workers, worker)), policy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(segment.fd,),
            text=True,
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def voters(segment: Segment, workers: int, policy: str) -> Iterator[list[Voter]]:
    started = [Voter(segment, workers, worker, policy) for worker in range(workers)]
    try:
        yield started
    finally:
        for voter in started:
            voter.process.kill()
            voter.process.communicate()


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"random", "two_choices"}))  # whose dice fall by process
def test_balancers_in_three_processes_choose_as_one_does(policy: str) -> None:
    """The same arrivals and departures, dealt at random to three processes and told to one balancer here."""
    dice = random.Random(policy)
    alone = balancer(policy)
    segment = Segment.create(size(3))
    open_: list[tuple[Voter, int, Lease]] = []
    with voters(segment, 3, policy) as processes:
        for _ in range(400):
            if open_ and dice.random() < 0.45:
                voter, number, lease = open_.pop(dice.randrange(len(open_)))
                voter.ask(f"close {number}")
                lease.close()
                continue
            ready = dice.sample(PORTS, dice.randint(1, len(PORTS)))
            tokens = dice.choice([1, 1, 10, 100, 100, 1000])
            lease = alone.take(Role.DECODE, pool((f"http://h:{port}" for port in ready), Role.DECODE), Demand(tokens))
            voter = dice.choice(processes)
            assert voter.ask(f"take decode {','.join(map(str, ready))} {tokens}") == lease.instance.url[-1]
            open_.append((voter, voter.taken, lease))
            voter.taken += 1
        rows = {voter.ask("rows " + ",".join(map(str, PORTS))) for voter in processes}
        assert len(rows) == 1, "all agree on whose row is which"
        watching = Ledger({}, Board(segment.buffer, 3, 0))
        assert all(watching.load(url) == alone.ledger.load(url) for url in (f"http://h:{port}" for port in PORTS))
        del watching
    segment.close()


def test_a_cell_is_read_whole_while_it_is_written() -> None:
    """Two values that differ in every byte, written as fast as can be in another process."""
    code = (
        "import sys; from proxy.workers.segment import Segment\n"
        "cells = Segment(int(sys.argv[1])).buffer.cast('q'); print('go', flush=True)\n"
        "while True: cells[1] = 0x0101010101010101; cells[1] = 0x0202020202020202"
    )
    segment = Segment.create(4096)
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(segment.fd)], stdout=subprocess.PIPE, pass_fds=(segment.fd,)
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        with segment.buffer.cast("q") as cells:
            seen = {cells[1] for _ in range(300_000)}
        assert seen <= {0, 0x0101010101010101, 0x0202020202020202}
    finally:
        writer.kill()
        writer.communicate()
    segment.close()
