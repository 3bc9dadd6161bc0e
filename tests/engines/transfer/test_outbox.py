"""Publications and revocations, asked as a peer would ask; `test_endpoint` has the ordinary course."""

import asyncio

import pytest

from engines.transfer.base import GoneError, LayoutMismatch, PeerFailed, TransferCancelled
from engines.transfer.liveness import here
from engines.transfer.messages import Fetch, Offer, Peer
from engines.transfer.outbox import Publication
from engines.transfer.spans import table
from tests.engines.transfer.nodes import IDLE, nothing, open_push, publish, reserve
from tests.support.waiting import until


@pytest.fixture
async def pair(nodes):
    return await nodes("memory"), await nodes("memory")


def fetch_of(where, ticket, **changes):
    return Fetch(where["key"], where["secret"], 5.0, ticket.wire_offer())


def test_a_publication_is_freed_when_withdrawn_and_unread_whichever_comes_last():
    for order in (["end", "read"], ["read", "end"]):
        freed = []
        publication = Publication("k", None, table([], 0), lambda freed=freed: freed.append(1), False, readers=1)
        getattr(publication, order[0])()
        assert freed == []
        getattr(publication, order[1])()
        assert freed == [1]


async def test_a_fetch_that_arrives_after_its_revocation_is_refused(pair):
    sender, receiver = pair
    where = await publish(sender, "k", b"data")
    ticket = reserve(receiver, [(0, 4)])
    side = sender.transfer._sending
    assert side.revoke(receiver.transfer.address, ticket.id)
    with pytest.raises(TransferCancelled, match="revoked before"):
        side.fetch(receiver.transfer.address, fetch_of(where, ticket))
    ticket.release()
    sender.transfer.withdraw("k")
    assert sender.transfer.audit() == IDLE


async def test_an_offer_fetches_only_for_its_maker_and_only_its_size(pair):
    sender, receiver = pair
    where = await publish(sender, "k", b"data")
    side = sender.transfer._sending
    right, wrong = reserve(receiver, [(0, 4)]), reserve(receiver, [(0, 5)])
    with pytest.raises(LayoutMismatch, match="process that made it"):
        side.fetch(here("127.0.0.1", 1), fetch_of(where, right))
    with pytest.raises(LayoutMismatch, match="do not fill"):
        side.fetch(receiver.transfer.address, fetch_of(where, wrong))
    with pytest.raises(GoneError):
        side.fetch(receiver.transfer.address, fetch_of(where | {"key": "other"}, right))
    right.release()
    wrong.release()
    sender.transfer.withdraw("k")


async def test_only_the_receiver_revokes_a_push(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket)
    assert sender.transfer._sending.revoke(here("127.0.0.1", 1), ticket.id)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    await push.finish()
    push.release(nothing)
    ticket.release()


async def test_an_offer_is_open_once(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket)
    with pytest.raises(TransferCancelled, match="open already"):
        await open_push(sender, ticket)
    await push.finish()
    push.release(nothing)
    ticket.release()


async def test_an_offer_that_lies_about_its_arena_is_given_back(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises(LayoutMismatch):
        await sender.transfer.open(ticket.offer() | {"arena_nbytes": 3}, timeout=5)
    with pytest.raises(PeerFailed, match="before it was let in"):
        await ticket.wait()
    ticket.release()


async def test_closing_tells_the_receivers(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)], timeout=60)
    push = await open_push(sender, ticket)
    await sender.transfer.close()
    async with asyncio.timeout(5):
        with pytest.raises(PeerFailed, match="shutting down"):
            await ticket.wait()
    push.release(nothing)
    ticket.release()
    await until(lambda: receiver.transfer.audit() == IDLE)


def test_an_offer_names_its_peer():
    address = here("127.0.0.1", 1)
    assert Offer("memory", Peer.of(address), "0" * 32, "kv", 1, [], {}).address.address() == address
