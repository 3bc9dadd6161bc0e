"""The data socket: what reaches it from strangers, and what happens to bytes that come too late."""

import os

import msgspec
import numpy as np
import pytest
import zmq

from engines.transfer.base import PeerFailed
from engines.transfer.zmq import BATCH, Ack, Batch, HeapArena, _batches
from tests.engines.transfer.nodes import MIB, nothing, open_push, reserve
from tests.support.waiting import until


@pytest.fixture
async def node(nodes):
    return await nodes("zmq")


@pytest.fixture
def stranger(node):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{node.transfer.plane._port}")
        yield socket


def send(socket, ticket, spans, payload):
    header = msgspec.msgpack.encode(Batch(ticket, 1, spans))
    socket.send_multipart([header, payload])
    assert socket.poll(5000)
    return msgspec.msgpack.decode(socket.recv(), type=Ack).error


@pytest.mark.parametrize(
    ("spans", "payload", "error"),
    [
        ([(99, 2)], b"xx", "outside the ticket's spans"),
        ([(200, 1)], b"x", "outside the ticket's spans"),
        ([(100, 101)], b"x" * 101, "outside the ticket's spans"),
        ([(2**61, 1)], b"x", "outside the arena"),
        ([(100, 2**62)], b"x", "outside the arena"),
        ([(100, 4)], b"xx", "length"),
        ([(100, 4)], b"x" * 5, "length"),
    ],
)
async def test_bytes_that_do_not_fit_the_ticket_are_refused(node, stranger, spans, payload, error):
    ticket = reserve(node, [(100, 100)])
    ticket.offer()
    before = node.read(0, 1000)
    assert error in send(stranger, ticket.id, spans, payload)
    assert node.read(0, 1000) == before
    assert node.transfer.plane.refused == 1
    assert send(stranger, ticket.id, [(100, 2), (150, 1)], b"abc") == ""
    assert (node.read(100, 2), node.read(150, 1)) == (b"ab", b"c")
    ticket.release()
    assert "not open" in send(stranger, ticket.id, [(100, 2)], b"ab")


@pytest.mark.parametrize("frames", [[b""], [b"\xc1", b"x"], [os.urandom(50), b""], [b"a", b"b", b"c"]])
async def test_garbage_is_dropped_and_the_socket_goes_on(node, stranger, frames):
    stranger.send_multipart(frames)
    await until(lambda: node.transfer.plane.refused == 1)
    ticket = reserve(node, [(0, 2)])
    ticket.offer()
    assert send(stranger, ticket.id, [(0, 2)], b"ok") == ""
    ticket.release()


async def test_a_push_into_a_ticket_that_is_over_is_refused_by_the_data_socket(nodes, node):
    sender = await nodes("zmq")
    ticket = reserve(node, [(0, MIB)])
    push = await open_push(sender, ticket)
    node.transfer.plane.forget(ticket.id)
    push.write(sender.arena, [(0, MIB)], [(0, MIB)])
    with pytest.raises(PeerFailed, match="not open"):
        await push.finish()
    push.release(nothing)
    ticket.release()


def test_one_run_is_sent_in_place_and_many_are_gathered():
    array = np.arange(4 * BATCH, dtype=np.uint32).view(np.uint8)[: 4 * BATCH]
    arena = HeapArena("a", array.nbytes, array.data, array)
    runs = list(_batches(arena, np.array([[7, 0, 2 * BATCH + 1]])))
    assert [payload.nbytes for _, payload in runs] == [BATCH, BATCH, 1]
    assert all(np.shares_memory(np.frombuffer(payload, dtype=np.uint8), array) for _, payload in runs)
    scattered = [[i * 64, i * 128, 32] for i in range(1000)]
    ((spans, payload),) = _batches(arena, np.array(scattered))
    assert spans == [(i * 128, 32) for i in range(1000)]
    assert bytes(payload) == b"".join(bytes(array[i * 64 : i * 64 + 32]) for i in range(1000))


async def test_a_socket_whose_thread_has_no_turn_is_closed_all_the_same(node, monkeypatch):
    plane = node.transfer.plane
    monkeypatch.setattr("engines.transfer.zmq.DRAIN_TIMEOUT", 0.0)
    plane.close()
    plane._thread.join(5.0)
    assert not plane._thread.is_alive()
