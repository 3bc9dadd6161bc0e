"""The yardsticks move the right bytes: a bench against something broken would flatter us."""

import pytest

from bench.transfer_raw import RawReceiver, RawSender, memcpy, move_all

SIZE = 4 << 20
SPANS = [(3 << 20, 1 << 20), (0, 1 << 20), (1 << 20, 16)]
TARGET = [(0, 1 << 20), (2 << 20, 1 << 20), (1 << 20, 16)]


@pytest.mark.parametrize("way", ["tcp", "sync", "polled", "gathered"])
def test_a_raw_use_fills_its_spans_and_nothing_else(way):
    pytest.importorskip("mooncake.engine", reason="Mooncake's libraries are missing")
    with RawReceiver(SIZE, mooncake=True) as receiver, RawSender(receiver.peer, SIZE) as sender:
        use = sender.tcp if way == "tcp" else sender.mooncake[way]
        use(SPANS, TARGET, 2)
        got = receiver._array
        for offset, length in TARGET:
            assert (got[offset : offset + length] == 7).all()
        assert int((got == 7).sum()) == sum(length for _, length in TARGET)


def test_memcpy_takes_scattered_spans():
    memcpy(SIZE)(SPANS, TARGET, 1)


def test_partial_socket_calls_are_continued():
    taken = bytearray()

    def three_bytes(pieces):
        taken.extend(bytes(pieces[0][:3]))
        return min(3, pieces[0].nbytes)

    move_all(three_bytes, [memoryview(b"abcdefgh"), memoryview(b"ij")])
    assert taken == b"abcdefghij"
