"""The contract of `Transfer`, the same for every transport that copies memory to memory."""

import asyncio
import random

import pytest

from engines.transfer.base import (
    GoneError,
    LayoutMismatch,
    PeerFailed,
    PeerUnreachable,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from engines.transfer.lifecycle import TicketState
from tests.engines.transfer.nodes import KIB, MIB, nothing, open_push, pattern, publish, reserve
from tests.support.waiting import until

# -- publish and fetch


async def test_published_bytes_arrive_and_both_sides_are_freed_once(pair, freed):
    sender, receiver = pair
    data = pattern(3 * MIB)
    where = await publish(sender, "k", data, offset=64, on_free=freed("published"))
    ticket = reserve(receiver, [(4096, len(data))], on_free=freed("ticket"))
    await ticket.fetch(where)
    assert ticket.state is TicketState.COMPLETE
    assert receiver.read(4096, len(data)) == data
    assert freed.names == []
    ticket.release()
    sender.transfer.withdraw("k")
    sender.transfer.withdraw("k")
    ticket.release()
    await until(lambda: sorted(freed.names) == ["published", "ticket"])


async def test_scattered_spans_keep_the_logical_order(pair):
    sender, receiver = pair
    rng = random.Random(7)
    source = [(block * 16 * KIB, 16 * KIB) for block in rng.sample(range(400), 100)]
    target = [(block * 32 * KIB + 8, 32 * KIB) for block in rng.sample(range(200), 50)]
    data = pattern(100 * 16 * KIB)
    for index, (offset, length) in enumerate(source):
        sender.fill(offset, data[index * length : (index + 1) * length])
    where = await sender.transfer.publish("k", sender.arena, source, ttl=None, on_free=nothing)
    ticket = reserve(receiver, target)
    await ticket.fetch(where)
    assert b"".join(receiver.read(offset, length) for offset, length in target) == data
    ticket.release()
    sender.transfer.withdraw("k")


async def test_any_number_of_fetches_at_once(pair):
    sender, receiver = pair
    data = [pattern(256 * KIB, seed) for seed in range(4)]
    wheres = [await publish(sender, str(i), data[i], offset=i * MIB) for i in range(4)]

    async def fetch(slot):
        ticket = reserve(receiver, [(slot * 256 * KIB, 256 * KIB)])
        await ticket.fetch(wheres[slot % 4])
        assert receiver.read(slot * 256 * KIB, 256 * KIB) == data[slot % 4]
        ticket.release()

    await asyncio.gather(*(fetch(slot) for slot in range(16)))
    for key in range(4):
        sender.transfer.withdraw(str(key))


async def test_an_empty_publication_can_be_fetched(pair):
    sender, receiver = pair
    where = await publish(sender, "k", b"")
    ticket = reserve(receiver, [])
    await ticket.fetch(where)
    ticket.release()
    sender.transfer.withdraw("k")


async def test_once_is_withdrawn_by_the_first_success(pair, freed):
    sender, receiver = pair
    where = await publish(sender, "k", b"once", on_free=freed("published"), once=True)
    first, second = reserve(receiver, [(0, 4)]), reserve(receiver, [(8, 4)])
    await first.fetch(where)
    await until(lambda: freed.names == ["published"])
    with pytest.raises(GoneError, match="not published"):
        await second.fetch(where)
    first.release()
    second.release()


async def test_the_owner_is_told_of_each_read_that_succeeded(pair):
    sender, receiver = pair
    reads = []
    where = await publish(sender, "k", b"data", on_read=lambda: reads.append("k"))
    for count in (1, 2):
        ticket = reserve(receiver, [(0, 4)])
        await ticket.fetch(where)
        ticket.release()
        await until(lambda count=count: len(reads) == count)
    sender.transfer.withdraw("k")
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises(GoneError):
        await ticket.fetch(where)
    ticket.release()
    assert len(reads) == 2


async def test_a_publication_is_fetched_part_by_part(pair, freed):
    sender, receiver = pair
    data, reads = pattern(8 * KIB), []
    spans = [(6 * KIB, 3 * KIB), (0, 5 * KIB)]
    for at, (offset, length) in zip((0, 3 * KIB), spans, strict=True):
        sender.fill(offset, data[at : at + length])
    where = await sender.transfer.publish(
        *("k", sender.arena, spans), ttl=None, on_free=freed("k"), on_read=lambda: reads.append("k"), once=True
    )
    got, begin, left = b"", 0, len(data)
    for number, (first, second) in enumerate([(KIB, 16), (3 * KIB, KIB), (1000, 0), (0, len(data) - 5 * KIB - 1016)]):
        ticket = reserve(receiver, [(64 * KIB, first), (16 * KIB, second)])
        left = await ticket.fetch(where, start=begin, more=number < 3)
        got += receiver.read(64 * KIB, first) + receiver.read(16 * KIB, second)
        begin += first + second
        assert left == len(data) - begin
        ticket.release()
        assert not reads, "it is read with the last part"
    assert (got, left) == (data, 0)
    await until(lambda: (reads, freed.names) == (["k"], ["k"]))


async def test_a_part_that_is_not_there_is_refused(pair):
    sender, receiver = pair
    where = await publish(sender, "k", pattern(KIB))
    ticket = reserve(receiver, [(0, KIB)])
    with pytest.raises(LayoutMismatch, match="1024 from byte 1 on"):
        await ticket.fetch(where, start=1)
    with pytest.raises(LayoutMismatch, match="there are no 1024 bytes from byte 1 on"):
        await ticket.fetch(where | {"nbytes": 2 * KIB}, start=1)
    ticket.release()
    sender.transfer.withdraw("k")


async def test_a_promise_is_fetched_part_by_part_and_who_asks_for_too_much_harms_nobody(pair):
    sender, receiver = pair
    data = pattern(KIB)
    where = await publish(sender, "k", bytes(KIB), promised=True)
    greedy, modest = reserve(receiver, [(0, KIB)]), reserve(receiver, [(KIB, 24)])
    with pytest.raises(LayoutMismatch, match="there are no 1024 bytes"):
        await greedy.fetch(where | {"nbytes": 2 * KIB}, start=KIB)
    fetching = asyncio.ensure_future(modest.fetch(where, start=KIB - 24))
    await until(lambda: sender.transfer.audit()["pushes"] == 1)
    sender.fill(0, data)
    sender.transfer.fulfil("k")
    assert await fetching == 0
    assert receiver.read(KIB, 24) == data[-24:]
    greedy.release()
    modest.release()
    sender.transfer.withdraw("k")


async def test_a_promise_is_fetched_before_it_is_fulfilled_and_after(pair, freed):
    sender, receiver = pair
    data, reads = pattern(KIB), []
    where = await publish(
        *(sender, "k", bytes(KIB)), promised=True, on_free=freed("published"), on_read=lambda: reads.append("k")
    )
    early, late = (reserve(receiver, [(slot * KIB, KIB)], on_free=freed(f"ticket{slot}")) for slot in range(2))
    fetching = asyncio.ensure_future(early.fetch(where))
    await until(lambda: sender.transfer.audit()["pushes"] == 1)
    sender.fill(0, data)
    assert not fetching.done()
    sender.transfer.fulfil("k")
    await fetching
    await late.fetch(where)
    assert [receiver.read(slot * KIB, KIB) for slot in range(2)] == [data, data]
    await until(lambda: reads == ["k", "k"])
    sender.transfer.withdraw("k")
    early.release()
    late.release()
    await until(lambda: sorted(freed.names) == ["published", "ticket0", "ticket1"])


async def test_a_promise_that_is_broken_fails_whoever_waits_and_frees_at_once(pair, freed):
    sender, receiver = pair
    where = await publish(sender, "k", bytes(KIB), promised=True, on_free=freed("published"))
    ticket = reserve(receiver, [(0, KIB)], on_free=freed("ticket"))
    fetching = asyncio.ensure_future(ticket.fetch(where))
    await until(lambda: sender.transfer.audit()["pushes"] == 1)
    sender.transfer.withdraw("k")
    assert freed.names == ["published"], "nobody had begun to read it"
    with pytest.raises(PeerFailed, match="promised"):
        await fetching
    ticket.release()
    with pytest.raises(LookupError):
        sender.transfer.fulfil("k")


async def test_who_left_before_a_promise_was_fulfilled_gets_nothing(pair, freed):
    sender, receiver = pair
    where = await publish(sender, "k", pattern(KIB), promised=True)
    ticket = reserve(receiver, [(0, KIB)], on_free=freed("ticket"))
    fetching = asyncio.ensure_future(ticket.fetch(where))
    await until(lambda: sender.transfer.audit()["pushes"] == 1)
    ticket.release()
    with pytest.raises(TransferCancelled):
        await fetching
    await until(lambda: freed.names == ["ticket"])
    sender.transfer.fulfil("k")
    assert receiver.read(0, KIB) == bytes(KIB)
    sender.transfer.withdraw("k")


async def test_a_time_to_live_ends_a_publication(pair, freed):
    sender, receiver = pair
    where = await publish(sender, "k", b"data", ttl=0.05, on_free=freed("published"))
    await until(lambda: freed.names == ["published"])
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    with pytest.raises(GoneError):
        await ticket.fetch(where)
    assert ticket.state is TicketState.BROKEN
    ticket.release()
    assert freed.names == ["published", "ticket"]


async def test_a_key_is_published_once_and_again_after_withdrawal(pair):
    sender, receiver = pair
    old = await publish(sender, "k", b"old!")
    with pytest.raises(ValueError, match="withdraw it first"):
        await publish(sender, "k", b"old!")
    sender.transfer.withdraw("k")
    new = await publish(sender, "k", b"new!", offset=64)
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises(GoneError):
        await ticket.fetch(old)
    ticket.release()
    ticket = reserve(receiver, [(0, 4)])
    await ticket.fetch(new)
    assert receiver.read(0, 4) == b"new!"
    ticket.release()
    sender.transfer.withdraw("k")


async def test_a_secret_guards_each_publication(pair):
    sender, receiver = pair
    where = await publish(sender, "k", b"data")
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises(GoneError):
        await ticket.fetch(where | {"secret": "0" * 32})
    ticket.release()
    sender.transfer.withdraw("k")


@pytest.mark.parametrize("change", [{"transport": "other"}, {"nbytes": 5}, {"address": {}}, {"secret": "x"}])
async def test_a_handle_that_does_not_fit_is_refused_before_anything_is_asked(pair, change):
    sender, receiver = pair
    where = await publish(sender, "k", b"data")
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises(LayoutMismatch):
        await ticket.fetch(where | change)
    assert ticket.state is TicketState.RESERVED
    ticket.release()
    sender.transfer.withdraw("k")


# -- push


async def test_a_push_in_many_writes_arrives_in_order(pair, freed):
    sender, receiver = pair
    data = pattern(2 * MIB)
    sender.fill(0, data)
    ticket = reserve(receiver, [(MIB, MIB), (4 * MIB, MIB)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    assert push.facts == {"who": "receiver"}
    assert ticket.state is TicketState.WRITING
    step = 64 * KIB
    for start in range(0, MIB, step):
        push.write(
            sender.arena,
            [(start, step), (MIB + start, step)],
            [(MIB + start, step), (4 * MIB + start, step)],
        )
    # the same place twice: the later write wins
    push.write(sender.arena, [(MIB, step)], [(MIB, step)])
    push.write(sender.arena, [(0, step)], [(MIB, step)])
    await push.finish()
    await ticket.wait()
    assert receiver.read(MIB, MIB) + receiver.read(4 * MIB, MIB) == data
    push.release(freed("push"))
    ticket.release()
    assert freed.names == ["push", "ticket"]


async def test_writes_come_from_any_thread(pair):
    sender, receiver = pair
    sender.fill(0, pattern(MIB))
    ticket = reserve(receiver, [(0, MIB)])
    push = await open_push(sender, ticket)
    step = 64 * KIB
    await asyncio.gather(
        *(
            asyncio.to_thread(push.write, sender.arena, [(start, step)], [(start, step)])
            for start in range(0, MIB, step)
        )
    )
    await push.finish()
    await ticket.wait()
    assert receiver.read(0, MIB) == pattern(MIB)
    push.release(nothing)
    ticket.release()


async def test_a_write_outside_the_offer_or_the_arena_is_refused(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(4096, 4096)])
    push = await open_push(sender, ticket)
    for source, target in [
        ([(0, 2)], [(4095, 2)]),
        ([(0, 2)], [(8191, 2)]),
        ([(-1, 2)], [(4096, 2)]),
        ([(sender.arena.nbytes, 1)], [(4096, 1)]),
        ([(0, 3)], [(4096, 2)]),
    ]:
        with pytest.raises(LayoutMismatch):
            push.write(sender.arena, source, target)
    await push.finish()
    push.release(nothing)
    ticket.release()


async def test_an_abort_fails_the_receiver_with_its_reason(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, MIB)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, MIB)], [(0, MIB)])
    await push.abort("the model crashed")
    with pytest.raises(PeerFailed, match="the model crashed"):
        await ticket.wait()
    with pytest.raises(TransferCancelled):
        push.write(sender.arena, [(0, 1)], [(0, 1)])
    with pytest.raises(TransferCancelled, match="the model crashed"):
        await push.finish()
    await push.abort("again")
    push.release(freed("push"))
    ticket.release()
    assert freed.names == ["push", "ticket"]


async def test_an_expired_ticket_is_refused(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)], timeout=0.05, on_free=freed("ticket"))
    offer = ticket.offer()
    with pytest.raises(TransferTimeout, match="nobody claimed"):
        await ticket.wait()
    with pytest.raises(TransferCancelled, match="not open"):
        await sender.transfer.open(offer, timeout=5)
    assert freed.names == []
    ticket.release()
    assert freed.names == ["ticket"]


async def test_a_ticket_has_one_writer(nodes, transport, pair):
    sender, receiver = pair
    other = await nodes(transport)
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket)
    with pytest.raises(TransferCancelled, match="another writer"):
        await open_push(other, ticket)
    await push.finish()
    await ticket.wait()
    with pytest.raises(TransferCancelled):
        await open_push(other, ticket)
    push.release(nothing)
    ticket.release()


async def test_a_claimed_ticket_expires_and_is_freed_when_its_writer_stopped(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)], timeout=0.2, on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    with pytest.raises(TransferTimeout, match="did not finish"):
        await ticket.wait()
    ticket.release()
    await until(lambda: freed.names == ["ticket"])
    with pytest.raises(TransferError):
        await push.finish()
    push.release(freed("push"))
    assert freed.names == ["ticket", "push"]


async def test_a_push_has_a_deadline(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket, timeout=0.2)
    with pytest.raises(PeerFailed, match="deadline"):
        await ticket.wait()
    with pytest.raises(TransferTimeout, match="deadline"):
        await push.finish()
    push.release(nothing)
    ticket.release()


async def test_release_without_finish_is_an_abort(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.release(freed("push"))
    with pytest.raises(PeerFailed, match="released"):
        await ticket.wait()
    ticket.release()
    await until(lambda: sorted(freed.names) == ["push", "ticket"])


# -- cancellation, in each state


async def test_releasing_an_unclaimed_ticket_frees_at_once(pair, freed):
    _, receiver = pair
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    ticket.offer()
    ticket.release()
    assert freed.names == ["ticket"]
    with pytest.raises(TransferCancelled):
        await ticket.wait()


async def test_releasing_a_claimed_ticket_stops_the_writer(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, MIB)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    ticket.release()
    assert freed.names == []
    await until(lambda: freed.names == ["ticket"])
    with pytest.raises(TransferCancelled, match="receiver released"):
        await push.finish()
    push.release(nothing)


async def test_a_cancelled_fetch_is_freed_when_the_owner_stopped(pair, freed):
    sender, receiver = pair
    where = await publish(sender, "k", pattern(4 * MIB))
    for delay in (0.0, 0.001, 0.003):
        ticket = reserve(receiver, [(0, 4 * MIB)], on_free=freed(f"ticket {delay}"))
        task = asyncio.ensure_future(ticket.fetch(where))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ticket.release()
    await until(lambda: len(freed.names) == 3)
    sender.transfer.withdraw("k")


async def test_a_cancelled_finish_still_ends_the_push(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4 * MIB)], on_free=freed("ticket"))
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4 * MIB)], [(0, 4 * MIB)])
    task = asyncio.ensure_future(push.finish())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    push.release(freed("push"))
    with pytest.raises(PeerFailed):
        await ticket.wait()
    ticket.release()
    await until(lambda: sorted(freed.names) == ["push", "ticket"])


# -- peers


async def test_a_closed_peer_fails_fetches_and_pushes(nodes, transport, freed):
    sender, receiver = await nodes(transport, timeout=0.5), await nodes(transport, timeout=0.5)
    where = await publish(sender, "k", b"data", on_free=freed("published"))
    idle = reserve(receiver, [(8, 4)])
    offer = idle.offer()
    await sender.transfer.close()
    assert freed.names == ["published"]
    ticket = reserve(receiver, [(0, 4)])
    with pytest.raises((TransferTimeout, PeerUnreachable)):
        await ticket.fetch(where)
    idle.release()
    with pytest.raises(PeerUnreachable):
        await sender.transfer.open(offer, timeout=1)
    ticket.release()
    assert receiver.transfer.audit()["quarantined_bytes"] == 4  # a live process: nothing is proved
    nodes.discard(receiver)
    await receiver.transfer.close()


async def test_a_claim_whose_answer_is_lost_does_not_keep_the_ticket(pair, freed):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)], on_free=freed("ticket"))
    offer = ticket.offer()
    ways = asyncio.TaskGroup()

    async def lose_answers(reader, writer):
        _, there = await asyncio.open_connection("127.0.0.1", port)
        there.write(await reader.read(1 << 16))
        await until(lambda: ticket.state is not TicketState.RESERVED)
        there.close()
        writer.close()

    port = offer["address"]["port"]
    lossy = await asyncio.start_server(lambda *way: ways.create_task(lose_answers(*way)), "127.0.0.1", 0)
    offer["address"]["port"] = lossy.sockets[0].getsockname()[1]
    async with ways:
        with pytest.raises(PeerFailed, match="was lost"):
            await sender.transfer.open(offer, timeout=5)
        with pytest.raises(PeerFailed, match="gave up before it was let in"):
            await ticket.wait()
    lossy.close()
    ticket.release()
    await until(lambda: freed.names == ["ticket"])


async def test_closing_ends_every_wait(pair, freed):
    _, receiver = pair
    unclaimed = reserve(receiver, [(0, 4)], on_free=freed("unclaimed"))
    waiting = asyncio.ensure_future(unclaimed.wait())
    await asyncio.sleep(0)
    await receiver.transfer.close()
    with pytest.raises(TransferCancelled, match="shutting down"):
        await waiting
    unclaimed.release()
    assert freed.names == ["unclaimed"]


async def test_pushes_to_several_peers_at_once(nodes, transport, pair):
    sender, first = pair
    second, third = await nodes(transport), await nodes(transport)
    sender.fill(0, pattern(MIB))

    async def push_to(receiver):
        ticket = reserve(receiver, [(MIB, MIB)])
        push = await open_push(sender, ticket)
        push.write(sender.arena, [(0, MIB)], [(MIB, MIB)])
        await push.finish()
        await ticket.wait()
        assert receiver.read(MIB, MIB) == pattern(MIB)
        push.release(nothing)
        ticket.release()

    await asyncio.gather(*(push_to(receiver) for receiver in (first, second, third) for _ in range(3)))


async def test_one_transfer_sends_to_itself(pair):
    node, _ = pair
    where = await publish(node, "k", b"data")
    ticket = reserve(node, [(100, 4)])
    await ticket.fetch(where)
    assert node.read(100, 4) == b"data"
    ticket.release()
    node.transfer.withdraw("k")


async def test_arenas_come_before_start(pair):
    with pytest.raises(RuntimeError, match="before start"):
        pair[0].transfer.allocate("late", 1)


async def test_repr_is_a_dashboard(pair):
    _, receiver = pair
    assert "idle" in repr(receiver.transfer)
    ticket = reserve(receiver, [(0, 4)])
    assert "tickets=1" in repr(receiver.transfer)
    assert "reserved 4 bytes" in repr(ticket)
    ticket.release()
