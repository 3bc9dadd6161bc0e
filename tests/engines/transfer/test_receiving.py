"""What a receiver answers to writers, honest and not; `test_endpoint` has the ordinary course."""

import asyncio

import msgspec
import pytest

from engines.transfer.base import PeerFailed, TransferCancelled, TransferTimeout
from engines.transfer.lifecycle import TicketState
from engines.transfer.liveness import here
from engines.transfer.messages import Close, Stopped
from tests.engines.transfer.nodes import publish, reserve
from tests.support.waiting import until


@pytest.fixture
async def node(nodes):
    return await nodes("memory", timeout=0.5)


@pytest.fixture
def dead():
    """A writer whose life is proved over."""
    return msgspec.structs.replace(here("127.0.0.1", 1), started=1)


def test_only_known_outcomes_exist():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "close", "ticket": "0" * 32, "outcome": "maybe"}, Close)


async def test_done_counts_only_from_the_writer(node):
    side, writer, stranger = node.transfer._receiving, here("127.0.0.1", 1), here("127.0.0.1", 2)
    ticket = reserve(node, [(0, 4)])
    with pytest.raises(TransferCancelled):
        side.close_ticket(writer, Close(ticket.id, "done"))
    side.claim(writer, ticket.id)
    assert side.claim(writer, ticket.id).facts == {}  # a repeated claim of the same writer
    with pytest.raises(TransferCancelled, match="another writer"):
        side.claim(stranger, ticket.id)
    with pytest.raises(TransferCancelled):
        side.close_ticket(stranger, Close(ticket.id, "done"))
    assert side.close_ticket(stranger, Close(ticket.id, "failed")) == Stopped(True)
    assert ticket.state is TicketState.WRITING
    assert side.close_ticket(writer, Close(ticket.id, "done")) == Stopped(True)
    assert side.close_ticket(writer, Close(ticket.id, "done")) == Stopped(True)
    await ticket.wait()
    assert side.close_ticket(writer, Close(ticket.id, "failed", "too late")) == Stopped(True)
    assert ticket.state is TicketState.COMPLETE
    ticket.release()


async def test_a_late_done_frees_the_quarantine_but_is_no_success(node, freed):
    side, writer = node.transfer._receiving, here("127.0.0.1", 1)
    ticket = reserve(node, [(0, 4)], on_free=freed("ticket"))
    side.claim(writer, ticket.id)
    ticket.release()
    assert ticket.state is TicketState.QUARANTINED
    with pytest.raises(TransferCancelled, match="given this ticket up"):
        side.close_ticket(writer, Close(ticket.id, "done"))
    assert freed.names == ["ticket"]


async def test_a_late_done_of_an_expired_ticket_does_not_complete_it(node):
    side, writer = node.transfer._receiving, here("127.0.0.1", 1)
    ticket = reserve(node, [(0, 4)], timeout=0.01)
    side.claim(writer, ticket.id)
    with pytest.raises(TransferTimeout):
        await ticket.wait()
    with pytest.raises(TransferCancelled, match="expired"):
        side.close_ticket(writer, Close(ticket.id, "done"))
    assert ticket.state is TicketState.BROKEN
    ticket.release()


async def test_a_dead_writer_is_found_by_housekeeping(node, dead, freed):
    ticket = reserve(node, [(0, 4)], timeout=60, on_free=freed("ticket"))
    node.transfer._receiving.claim(dead, ticket.id)
    async with asyncio.timeout(5):
        with pytest.raises(PeerFailed, match="died"):
            await ticket.wait()
    ticket.release()
    await until(lambda: freed.names == ["ticket"])


async def test_the_grace_of_a_transport_delays_the_proof(node, dead, freed):
    ticket = reserve(node, [(0, 4)], timeout=60, on_free=freed("ticket"))
    ticket.grace = 2
    node.transfer._receiving.claim(dead, ticket.id)
    ticket.release()
    await until(lambda: ticket.grace == 1)
    assert freed.names == []
    await until(lambda: freed.names == ["ticket"])


async def test_a_restarted_owner_is_a_new_peer(nodes, node, freed):
    owner = await nodes("memory")
    where = await publish(owner, "k", b"data")
    where["address"]["nonce"] = "0" * 32
    ticket = reserve(node, [(0, 4)], on_free=freed("ticket"))
    with pytest.raises(PeerFailed, match="restarted"):
        await ticket.fetch(where)
    ticket.release()
    await until(lambda: freed.names == ["ticket"])
    owner.transfer.withdraw("k")


async def test_a_failing_on_free_does_not_end_the_housekeeping(node, dead, freed, caplog):
    def broken():
        raise ZeroDivisionError("on_free")

    first = reserve(node, [(0, 4)], on_free=broken)
    node.transfer._receiving.claim(dead, first.id)
    first.release()
    await until(lambda: "on_free" in caplog.text)
    second = reserve(node, [(0, 4)], on_free=freed("second"))
    node.transfer._receiving.claim(dead, second.id)
    second.release()
    await until(lambda: freed.names == ["second"])
