import numpy as np
import pytest

from engines.transfer.base import TransferCancelled
from engines.transfer.copying import PIECE, address_of, copy, move


class Halt:
    deadline = 0.0

    def __init__(self, looks=10**9):
        self.looks = looks

    def check(self):
        self.looks -= 1
        if self.looks < 0:
            raise TransferCancelled("enough")


def memory(nbytes, seed):
    return np.random.default_rng(seed).integers(0, 255, nbytes, dtype=np.uint8)


@pytest.mark.parametrize(
    "moves",
    [
        [],
        [[5, 0, 100], [0, 200, 5]],
        [[0, 0, 2 * PIECE + 3], [3, 2 * PIECE + 10, 4]],
        [[i * 16, (2000 - i) * 16, 16] for i in range(2000)],
    ],
)
def test_copies_exactly_the_moves(moves):
    source, target = memory(2 * PIECE + 100, 1), memory(2 * PIECE + 100, 2)
    expected = target.copy()
    for start, to, length in moves:
        expected[to : to + length] = source[start : start + length]
    table = np.array(moves, dtype=np.int64).reshape(-1, 3)
    copy(address_of(source.data), address_of(target.data), table, Halt())
    assert (target == expected).all()


def test_moves_between_absolute_addresses():
    source, target = memory(100, 1), memory(100, 2)
    expected = target.copy()
    expected[:10], expected[50:53] = source[90:], source[20:23]
    at, to = source.ctypes.data, target.ctypes.data
    move(np.array([[at + 90, to, 10], [at + 20, to + 50, 3]]))
    assert (target == expected).all()


def test_stops_between_pieces():
    source, target = memory(3 * PIECE, 1), np.zeros(3 * PIECE, dtype=np.uint8)
    with pytest.raises(TransferCancelled):
        copy(source.ctypes.data, target.ctypes.data, np.array([[0, 0, 3 * PIECE]]), Halt(looks=1))
    assert (target[:PIECE] == source[:PIECE]).all()
    assert not target[PIECE:].any()
