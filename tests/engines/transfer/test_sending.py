"""One push and its thread, with an outbox that only takes notes."""

import asyncio
import threading
import time

import pytest

from engines.transfer.base import LayoutMismatch, PeerFailed, PeerUnreachable, TransferCancelled, TransferTimeout
from engines.transfer.lifecycle import PushState
from engines.transfer.liveness import here
from engines.transfer.memory import MemoryPlane
from engines.transfer.messages import Offer, Peer
from engines.transfer.plane import Unsettled
from engines.transfer.sending import OutgoingPush, PeerSender
from tests.support.waiting import until


class Notes:
    def __init__(self):
        self.events = []
        self.deliver_error = None

    async def deliver(self, push):
        self.events.append("deliver")
        if self.deliver_error:
            raise self.deliver_error

    def conclude(self, push):
        self.events.append("conclude")

    def settled(self, push):
        self.events.append("settled")

    def spawn(self, work):
        return asyncio.create_task(work)


class Bench:
    """A push from `plane` to a receiver of 100 bytes, of which 10 to 60 are offered."""

    def __init__(self, deadline=30.0):
        self.plane, self.receiver, self.notes = MemoryPlane(), MemoryPlane(), Notes()
        self.arena, self.target = self.plane.allocate("kv", 100), self.receiver.allocate("kv", 100)
        self.arena.buffer[:] = bytes(range(100))
        self.address = here("127.0.0.1", 1)
        self.receiver.start(self.address, None)
        self.sender = PeerSender(self.plane, self.address, 5)
        offer = Offer("memory", Peer.of(self.address), "0" * 32, "kv", 100, [(10, 50)], {"arena": "kv"})
        self.push = OutgoingPush(self.notes, self.sender, offer, {}, time.monotonic() + deadline)

    def write(self, source=0, target=10, length=10, last=False):
        self.push.write(self.arena, [(source, length)], [(target, length)], last=last)

    def close(self):
        self.sender.close(5)
        self.receiver.close()


@pytest.fixture
async def bench():
    made = Bench()
    yield made
    made.close()


async def test_finish_settles_before_it_delivers(bench):
    bench.write()
    bench.write(50, 50, 10)
    await bench.push.finish()
    assert bench.notes.events == ["settled", "deliver"]
    assert bytes(bench.target.buffer[10:20]) == bytes(range(10))
    assert bytes(bench.target.buffer[50:60]) == bytes(range(50, 60))
    assert bench.push.settled


async def test_bytes_are_read_once_they_are_ready(bench):
    def come():
        bench.arena.buffer[:10] = b"0123456789"

    bench.push.write(bench.arena, [(0, 10)], [(10, 10)], come)
    await bench.push.finish()
    assert bytes(bench.target.buffer[10:20]) == b"0123456789"


async def test_bytes_that_never_come_fail_the_push(bench):
    def fail():
        raise RuntimeError("the device is lost")

    bench.push.write(bench.arena, [(0, 10)], [(10, 10)], fail)
    with pytest.raises(PeerFailed, match="the device is lost"):
        await bench.push.finish()


async def test_writes_after_the_end_are_refused(bench):
    await bench.push.finish()
    with pytest.raises(TransferCancelled, match="no more writes"):
        bench.write()
    await bench.push.finish()
    assert bench.notes.events == ["settled", "deliver"]


async def test_the_last_write_delivers_by_itself(bench):
    bench.write()
    bench.write(50, 50, 10, last=True)
    await until(lambda: "deliver" in bench.notes.events)
    assert bytes(bench.target.buffer[50:60]) == bytes(range(50, 60))
    with pytest.raises(TransferCancelled, match="no more writes"):
        bench.write()
    await bench.push.finish()
    assert bench.notes.events == ["settled", "deliver"]


async def test_a_finish_right_behind_the_last_write_delivers_once(bench):
    bench.write(last=True)
    await bench.push.finish()
    await asyncio.sleep(0)
    assert bench.notes.events == ["settled", "deliver"]


async def test_a_last_write_that_fails_is_told_without_being_asked_and_to_who_asks(bench):
    def fail(moves):
        raise PeerFailed("gone")

    bench.plane.script = fail
    bench.write(last=True)
    await until(lambda: bench.notes.events == ["settled", "conclude"])
    with pytest.raises(PeerFailed, match="gone"):
        await bench.push.finish()


async def test_a_push_stopped_behind_its_last_write_is_not_delivered(bench):
    entered, go = threading.Event(), threading.Event()
    bench.plane.script = lambda moves: (entered.set(), go.wait(10))
    bench.write(last=True)
    await until(lambda: entered.is_set() and bench.push.state is PushState.DRAINING)
    bench.push.stop(TransferCancelled("enough"))
    go.set()
    await until(lambda: "conclude" in bench.notes.events)
    assert bench.notes.events == ["settled", "conclude"]
    with pytest.raises(TransferCancelled, match="enough"):
        await bench.push.finish()


async def test_a_push_stopped_before_the_loop_has_heard_of_its_last_write_is_not_delivered(bench):
    bench.write(last=True)
    bench.push.stop(TransferCancelled("enough"))
    await until(lambda: bench.push.settled)
    assert bench.notes.events == ["conclude", "settled"]
    with pytest.raises(TransferCancelled, match="enough"):
        await bench.push.finish()


async def test_whoever_stops_waiting_for_the_end_stops_the_push(bench):
    go = threading.Event()
    bench.plane.script = lambda moves: go.wait(10)
    bench.write()
    finishing = asyncio.create_task(bench.push.finish())
    await asyncio.sleep(0.01)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert bench.push.state is PushState.STOPPING
    go.set()
    await until(lambda: bench.notes.events == ["settled", "conclude"])


async def test_nothing_outside_the_offer_is_even_queued(bench):
    for target in (9, 51, 99):
        with pytest.raises(LayoutMismatch):
            bench.write(target=target)
    assert bench.sender.idle


async def test_after_a_failed_write_the_rest_is_skipped_and_the_first_error_is_raised(bench):
    calls = []

    def fail(moves):
        calls.append(moves)
        raise PeerFailed(f"write {len(calls)}")

    bench.plane.script = fail
    for _ in range(3):
        bench.write()
    with pytest.raises(PeerFailed, match="write 1"):
        await bench.push.finish()
    assert len(calls) == 1
    assert bench.notes.events == ["settled", "conclude"]


async def test_a_lost_write_is_settled_only_by_proof(bench):
    def lose(moves):
        raise Unsettled("x")

    freed = []
    bench.plane.script = lose
    bench.write()
    with pytest.raises(PeerFailed, match="did not settle"):
        await bench.push.finish()
    assert bench.push.state is PushState.UNSETTLED
    bench.push.release(lambda: freed.append(1))
    assert freed == []
    bench.push.settle()
    bench.push.settle()
    assert freed == [1]


async def test_a_delivery_that_fails_is_the_push_s_error_with_its_memory_free(bench):
    bench.notes.deliver_error = TransferTimeout("no answer")
    bench.write()
    with pytest.raises(TransferTimeout):
        await bench.push.finish()
    assert bench.push.settled
    assert bench.notes.events == ["settled", "deliver", "conclude"]


async def test_stopping_waits_for_the_running_write(bench):
    entered, go = threading.Event(), threading.Event()
    bench.plane.script = lambda moves: (entered.set(), go.wait(10))
    bench.write()
    bench.write(20, 20, 10)
    await until(entered.is_set)
    bench.push.stop(TransferCancelled("enough"))
    bench.push.stop(TransferCancelled("again"))
    assert bench.push.state is PushState.STOPPING
    go.set()
    await bench.push.drained()
    assert bench.push.settled
    assert bytes(bench.target.buffer[20:30]) == bytes(10), "the second write was skipped"
    assert bench.notes.events == ["conclude", "settled"]


async def test_finish_ends_at_the_deadline_while_the_write_hangs():
    bench = Bench(deadline=0.2)
    go = threading.Event()
    bench.plane.script = lambda moves: go.wait(10)
    bench.write()
    with pytest.raises(TransferTimeout, match="deadline"):
        await bench.push.finish()
    freed = []
    bench.push.release(lambda: freed.append(1))
    assert freed == []
    go.set()
    await until(lambda: freed == [1])
    bench.close()


async def test_a_peer_that_cannot_be_reached_is_retryable_and_settled(bench):
    bench.receiver.close()
    bench.write()
    with pytest.raises(PeerUnreachable):
        await bench.push.finish()
    assert bench.push.settled


async def test_an_idle_thread_ends_and_the_next_write_starts_another(bench, monkeypatch):
    monkeypatch.setattr("engines.transfer.sending.IDLE_THREAD", 0.02)
    bench.write()
    await until(lambda: bench.sender.idle)
    bench.write(20, 20, 10)
    await bench.push.finish()
    assert bytes(bench.target.buffer[20:30]) == bytes(range(20, 30))
    await asyncio.sleep(0)
