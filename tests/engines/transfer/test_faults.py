"""Real processes, killed and stopped while bytes move. Nothing may be overwritten and nothing may stay behind."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from engines.transfer.base import PeerFailed, PeerUnreachable, TransferError, TransferTimeout
from tests.engines.transfer.nodes import IDLE, MIB, nothing, open_push, publish, reserve
from tests.support.waiting import eventually, until

TRANSPORTS = ["shm", "zmq", "mooncake"]
MARK, NEIGHBOUR = 0xAA, 0xBB


class Process:
    """A child and the calls to it."""

    def __init__(self, process):
        self._process = process
        self.pid = process.pid

    async def __call__(self, name, **arguments):
        self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        async with asyncio.timeout(20):
            line = await self._process.stdout.readline()
        assert line, "the child died"
        return json.loads(line)

    def signal(self, number):
        self._process.send_signal(number)

    async def idle(self):
        await eventually(self._is_idle, 30)

    async def _is_idle(self):
        return await self("audit") == IDLE

    async def end(self):
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            async with asyncio.timeout(15):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
async def spawn(transport):
    children = []

    async def start():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.engines.transfer.child",
            transport,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        child = Process(process)
        children.append(child)
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b'"ready"\n'
        return child

    yield start
    for child in children:
        await child.end()


@pytest.fixture
def black_hole():
    """A port that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def being_written(node, child, freed, *, timeout):
    """A ticket of 2 MiB at 1 MiB in our arena, neighbours marked, that `child` is writing all the time."""
    node.fill(0, bytes([NEIGHBOUR]) * node.arena.nbytes)
    await child("fill", offset=0, length=2 * MIB, byte=MARK)
    ticket = reserve(node, [(MIB, 2 * MIB)], timeout=timeout, on_free=freed("ticket"))
    await child("push_forever", offer=ticket.offer(), target=MIB, length=2 * MIB)
    await until(lambda: node.arena.buffer[MIB] == MARK, 20)
    return ticket


def neighbours_are_whole(node):
    return set(node.read(0, MIB)) | set(node.read(3 * MIB, MIB)) == {NEIGHBOUR}


async def test_a_killed_sender_fails_the_ticket_and_frees_it(nodes, transport, spawn, freed):
    node, child = await nodes(transport), await spawn()
    ticket = await being_written(node, child, freed, timeout=60)
    child.signal(signal.SIGKILL)
    async with asyncio.timeout(10):
        with pytest.raises(PeerFailed, match="died"):
            await ticket.wait()
    ticket.release()
    await until(lambda: freed.names == ["ticket"])
    assert neighbours_are_whole(node)


async def test_a_stopped_sender_holds_its_memory_in_quarantine_until_it_resumes(nodes, transport, spawn, freed):
    node, child = await nodes(transport, timeout=0.5), await spawn()
    ticket = await being_written(node, child, freed, timeout=2)
    child.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout):
        await ticket.wait()
    ticket.release()
    if transport == "zmq":  # the receiver's own thread does the writing: closing the ticket is proof
        await until(lambda: freed.names == ["ticket"])
    else:
        await asyncio.sleep(1.5)  # several rounds of asking in vain
        assert freed.names == []
        assert node.transfer.audit() == IDLE | {"quarantined_bytes": 2 * MIB}
    child.signal(signal.SIGCONT)
    await until(lambda: freed.names == ["ticket"], 20)
    # the memory is somebody else's now
    node.fill(MIB, bytes([NEIGHBOUR]) * 2 * MIB)
    await child.idle()
    assert set(node.read(MIB, 2 * MIB)) == {NEIGHBOUR}
    assert neighbours_are_whole(node)


async def test_a_stopped_sender_that_is_killed_frees_the_quarantine(nodes, transport, spawn, freed):
    node, child = await nodes(transport, timeout=0.5), await spawn()
    ticket = await being_written(node, child, freed, timeout=60)
    child.signal(signal.SIGSTOP)
    ticket.release()
    child.signal(signal.SIGKILL)
    await until(lambda: freed.names == ["ticket"], 20)


async def test_a_stopped_owner_fails_the_fetch_and_writes_nothing_later(nodes, transport, spawn, freed):
    node, child = await nodes(transport, timeout=0.5), await spawn()
    await child("fill", offset=0, length=2 * MIB, byte=MARK)
    where = await child("publish", key="k", offset=0, length=2 * MIB)
    child.signal(signal.SIGSTOP)
    ticket = reserve(node, [(0, 2 * MIB)], timeout=10, on_free=freed("ticket"))
    with pytest.raises(TransferTimeout):
        await ticket.fetch(where)
    ticket.release()
    child.signal(signal.SIGCONT)
    await until(lambda: freed.names == ["ticket"], 20)
    node.fill(0, bytes([NEIGHBOUR]) * 2 * MIB)
    await child("withdraw", key="k")
    await child.idle()
    assert set(node.read(0, 2 * MIB)) == {NEIGHBOUR}
    # and it serves again
    await child("fill", offset=0, length=2 * MIB, byte=MARK)
    where = await child("publish", key="k", offset=0, length=2 * MIB)
    ticket = reserve(node, [(0, 2 * MIB)])
    await ticket.fetch(where)
    assert set(node.read(0, 2 * MIB)) == {MARK}
    ticket.release()
    await child("withdraw", key="k")


async def write_until_it_fails(push, node):
    with contextlib.suppress(TransferError):
        while not push.halted:
            push.write(node.arena, [(0, 2 * MIB)], [(MIB, 2 * MIB)])
            await asyncio.sleep(0.005)


async def test_a_killed_receiver_fails_the_push_and_frees_it(nodes, transport, spawn, freed):
    node, child = await nodes(transport), await spawn()
    offer = await child("reserve", offset=MIB, length=2 * MIB, timeout=60)
    push = await node.transfer.open(offer, timeout=60)
    writing = asyncio.ensure_future(write_until_it_fails(push, node))
    await asyncio.sleep(0.1)
    child.signal(signal.SIGKILL)
    async with asyncio.timeout(15):
        await writing
    with pytest.raises(TransferError):
        await push.finish()
    push.release(freed("push"))
    await until(lambda: freed.names == ["push"], 20)


async def test_a_stopped_receiver_fails_the_push_and_all_is_freed_when_it_resumes(nodes, transport, spawn, freed):
    node, child = await nodes(transport, timeout=0.5), await spawn()
    node.fill(0, bytes([MARK]) * 2 * MIB)
    await child("fill", offset=0, length=4 * MIB, byte=NEIGHBOUR)
    offer = await child("reserve", offset=MIB, length=2 * MIB, timeout=1.5)
    push = await node.transfer.open(offer, timeout=1.0)
    child.signal(signal.SIGSTOP)
    for _ in range(8):
        push.write(node.arena, [(0, 2 * MIB)], [(MIB, 2 * MIB)])
    began = time.monotonic()
    with pytest.raises(TransferTimeout):
        await push.finish()
    assert time.monotonic() - began < 10
    push.release(freed("push"))
    child.signal(signal.SIGCONT)
    await until(lambda: freed.names == ["push"], 20)
    await child.idle()
    assert await child("bytes_in", offset=0, length=MIB) == [NEIGHBOUR]
    assert await child("bytes_in", offset=3 * MIB, length=MIB) == [NEIGHBOUR]


async def test_a_hung_peer_does_not_block_a_healthy_one(nodes, transport, spawn):
    node, healthy, child = await nodes(transport, timeout=0.5), await nodes(transport), await spawn()
    warm = await node.transfer.open(await child("reserve", offset=0, length=MIB, timeout=60), timeout=5)
    warm.write(node.arena, [(0, MIB)], [(0, MIB)])
    await warm.finish()
    warm.release(nothing)
    known = await node.transfer.open(await child("reserve", offset=0, length=2 * MIB, timeout=60), timeout=3)
    new_offer = await child("reserve", offset=2 * MIB, length=MIB, timeout=60)
    child.signal(signal.SIGSTOP)
    for _ in range(8):
        known.write(node.arena, [(0, 2 * MIB)], [(0, 2 * MIB)])
    hung = asyncio.gather(known.finish(), node.transfer.open(new_offer, timeout=1), return_exceptions=True)
    for _ in range(5):
        async with asyncio.timeout(2):
            ticket = reserve(healthy, [(MIB, MIB)])
            push = await open_push(node, ticket)
            push.write(node.arena, [(0, MIB)], [(MIB, MIB)])
            await push.finish()
            await ticket.wait()
            push.release(nothing)
            ticket.release()
    assert all(isinstance(error, TransferTimeout) for error in await hung)
    known.release(nothing)
    child.signal(signal.SIGCONT)
    await child.idle()


async def test_first_contact_with_a_control_port_that_never_answers(nodes, transport, black_hole):
    node, other = await nodes(transport, timeout=0.5), await nodes(transport)
    ticket = reserve(other, [(0, 4)])
    offer = ticket.offer()
    offer["address"]["port"] = black_hole
    with pytest.raises(TransferTimeout, match="did not answer"):
        await node.transfer.open(offer, timeout=5)
    ticket.release()


@pytest.mark.parametrize("transport", ["zmq", "mooncake"], indirect=True)
async def test_first_contact_with_a_data_port_that_never_answers(nodes, transport, black_hole, freed):
    node, hung, healthy = await nodes(transport), await nodes(transport), await nodes(transport)
    ticket = reserve(hung, [(0, MIB)], timeout=30)
    offer = ticket.offer()
    offer["region"] |= {"port": black_hole} if transport == "zmq" else {"session": f"127.0.0.1:{black_hole}"}
    push = await node.transfer.open(offer, timeout=3)
    push.write(node.arena, [(0, MIB)], [(0, MIB)])
    failing = asyncio.ensure_future(push.finish())
    where = await publish(node, "k", b"data")
    async with asyncio.timeout(2):
        other = reserve(healthy, [(0, 4)])
        await other.fetch(where)
    with pytest.raises((TransferTimeout, PeerUnreachable)):
        await failing
    with pytest.raises(PeerFailed):
        await ticket.wait()
    push.release(freed("push"))
    await until(lambda: freed.names == ["push"])
    ticket.release()
    other.release()
    node.transfer.withdraw("k")


@pytest.mark.parametrize("transport", ["shm"], indirect=True)
async def test_a_killed_process_leaves_segments_only_until_the_next_start(nodes, transport, spawn):
    child = await spawn()
    left = {path for path in Path("/dev/shm").iterdir() if f"-{child.pid}-" in path.name}
    assert left
    child.signal(signal.SIGKILL)
    await child._process.wait()
    await nodes(transport)
    assert not left & set(Path("/dev/shm").iterdir())
