import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.transfer.staging import FEW, LARGE, Slots, batches, one_run, packed, worth_staging

MOVES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 40)), min_size=1, max_size=9)


@given(MOVES, st.integers(1, 64))
def test_batches_hold_every_byte_in_order_and_at_most_a_slot(rows, size):
    cut = batches(np.array(rows, dtype=np.int64), size)
    flat = [(s + i, t + i) for batch in cut for s, t, n in batch.tolist() for i in range(n)]
    assert flat == [(s + i, t + i) for s, t, n in rows for i in range(n)]
    sizes = [int(batch[:, 2].sum()) for batch in cut]
    assert all(n == size for n in sizes[:-1])
    assert 0 < sizes[-1] <= size


def test_slots_are_leased_to_owners_and_never_twice():
    slots = Slots(3, 64)
    assert slots.lease("a", 2) == [0, 64]
    assert slots.lease("b", 2) == [128]
    assert slots.lease("c", 1) == []
    assert slots.leased == 3
    assert slots.holds("a", 64)
    assert not slots.holds("a", 128)
    assert not slots.holds("a", 1)
    assert not slots.holds("a", -64)
    assert not slots.holds("a", 3 * 64)
    slots.give_back("a")
    assert slots.leased == 1
    assert slots.lease("c", 9) == [0, 64]


def test_many_small_moves_are_worth_staging():
    def moves(count, length):
        return np.array([[0, 0, length]] * count, dtype=np.int64).reshape(-1, 3)

    assert worth_staging(moves(1000, 16384))
    assert not worth_staging(moves(FEW, 16384))
    assert not worth_staging(moves(1000, LARGE))
    assert not worth_staging(moves(0, 1))


def test_packed_and_one_run_agree():
    lengths = np.array([3, 5, 1])
    offsets = packed(lengths, 10)
    assert offsets.tolist() == [10, 13, 18]
    assert one_run(offsets, lengths)
    assert not one_run(offsets + np.array([0, 1, 0]), lengths)
