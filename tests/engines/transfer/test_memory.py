"""The scripted in-memory transport, and through it what is hard to provoke elsewhere: writes that never settle."""

import asyncio
import threading

import pytest

from engines.transfer.base import PeerFailed, TransferError
from engines.transfer.lifecycle import TicketState
from engines.transfer.plane import Unsettled
from tests.engines.transfer.nodes import IDLE, open_push, reserve
from tests.support.waiting import until


@pytest.fixture
async def pair(nodes):
    return await nodes("memory"), await nodes("memory")


def lose(moves):
    raise Unsettled("scripted")


async def lost_push(pair, freed):
    sender, receiver = pair
    sender.fill(0, b"late")
    sender.transfer.plane.script = lose
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(PeerFailed, match="did not settle"):
        await push.finish()
    push.release(freed("push"))
    with pytest.raises(PeerFailed, match="did not settle"):
        await ticket.wait()
    ticket.release()
    return ticket


async def test_a_lost_write_quarantines_both_sides_until_the_receiver_can_shut_it_out(pair, freed):
    sender, receiver = pair
    ticket = await lost_push(pair, freed)
    await asyncio.sleep(0.6)  # two rounds of asking
    assert freed.names == []
    assert ticket.state is TicketState.QUARANTINED
    assert receiver.transfer.audit() == IDLE | {"quarantined_bytes": 4}
    assert sender.transfer.audit() == IDLE | {"pushes": 1}
    sender.transfer.plane.land()
    assert receiver.read(0, 4) == b"late"
    receiver.transfer.plane.revocable = True
    await until(lambda: sorted(freed.names) == ["push", "ticket"])


async def test_a_settled_failure_frees_both_sides_at_once(pair, freed):
    sender, receiver = pair

    def fail(moves):
        raise PeerFailed("scripted")

    sender.transfer.plane.script = fail
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(PeerFailed, match="scripted"):
        await push.finish()
    push.release(freed("push"))
    assert freed.names == ["push"]
    with pytest.raises(PeerFailed, match="scripted"):
        await ticket.wait()
    ticket.release()
    assert freed.names == ["push", "ticket"]


async def test_an_unknown_error_of_a_transport_counts_as_unsettled(pair, freed, caplog):
    sender, receiver = pair

    def crash(moves):
        raise ZeroDivisionError("a bug")

    sender.transfer.plane.script = crash
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(PeerFailed, match="a bug"):
        await push.finish()
    push.release(freed("push"))
    ticket.release()
    assert freed.names == []
    receiver.transfer.plane.revocable = True
    await until(lambda: sorted(freed.names) == ["push", "ticket"])
    assert "ZeroDivisionError" in caplog.text


async def test_withdrawing_during_a_fetch_waits_for_it(pair, freed):
    sender, receiver = pair
    entered, go = threading.Event(), threading.Event()

    def wait(moves):
        entered.set()
        go.wait(10)

    sender.transfer.plane.script = wait
    sender.fill(0, b"data")
    where = await sender.transfer.publish("k", sender.arena, [(0, 4)], ttl=None, on_free=freed("published"))
    ticket = reserve(receiver, [(8, 4)])
    fetching = asyncio.ensure_future(ticket.fetch(where))
    await until(entered.is_set)
    sender.transfer.withdraw("k")
    assert freed.names == []
    assert sender.transfer.audit()["publications"] == 1
    go.set()
    await fetching
    assert receiver.read(8, 4) == b"data"
    await until(lambda: freed.names == ["published"])
    ticket.release()


async def test_cancelling_during_the_write_quarantines_until_it_ended(pair, freed):
    sender, receiver = pair
    entered, go = threading.Event(), threading.Event()

    def wait(moves):
        entered.set()
        go.wait(10)

    sender.transfer.plane.script = wait
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    await until(entered.is_set)
    ticket.release()
    aborting = asyncio.ensure_future(push.abort("cancelled"))
    await asyncio.sleep(0.3)
    assert freed.names == []
    go.set()
    await aborting
    await until(lambda: freed.names == ["ticket"])
    with pytest.raises(TransferError):
        await push.finish()
    push.release(freed("push"))
    assert freed.names == ["ticket", "push"]
