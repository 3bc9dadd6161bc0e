"""Sessions, their retirement, and the questions a peer may put; the library itself runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.transfer import create
from engines.transfer.base import LayoutMismatch, TransferCancelled, TransportUnavailable
from engines.transfer.spans import pack
from tests.engines.transfer.nodes import IDLE, MIB, nothing, open_push, reserve
from tests.support.waiting import until

pytest.importorskip("mooncake.engine", reason="Mooncake's libraries are missing", exc_type=ImportError)

HCA = any(Path("/sys/class/infiniband").glob("*"))


@pytest.mark.skipif(HCA, reason="this machine has an HCA")
def test_rdma_without_an_hca_is_an_error_and_never_tcp():
    with pytest.raises(TransportUnavailable, match="no HCA"):
        create("mooncake", rdma=True)


def test_a_missing_library_is_named_with_the_fix():
    code = (
        "import sys; sys.modules['mooncake'] = None\n"
        "from engines.transfer import create\n"
        "from engines.transfer.base import TransportUnavailable\n"
        "try: create('mooncake')\n"
        "except TransportUnavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "triptych[mooncake]" in done.stdout
    assert "apt-get install libibverbs1 libnuma1 libcurl4" in done.stdout


@pytest.fixture
async def pair(nodes):
    return await nodes("mooncake"), await nodes("mooncake")


async def test_a_lost_write_gets_a_fresh_session_and_the_old_one_is_destroyed(pair, freed):
    sender, receiver = pair
    plane = receiver.transfer.plane
    ticket, healthy = reserve(receiver, [(0, 4)], on_free=freed("lost")), reserve(receiver, [(MIB, 4)])
    offer = ticket.offer()
    old = offer["region"]["session"]
    other = await open_push(sender, healthy)
    offer["region"]["base"] = 4096  # the receiver will refuse this address, as after a fault
    push = await sender.transfer.open(offer, timeout=10)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(Exception, match="did not settle"):
        await push.finish()
    push.release(freed("push"))
    ticket.release()
    await until(lambda: plane._session.id != old)
    assert freed.names == []  # the healthy ticket still needs the old session
    other.release(nothing)
    healthy.release()
    await until(lambda: sorted(freed.names) == ["lost", "push"], 15)
    assert old in sender.transfer.plane.poisoned
    sender.fill(0, b"next")
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket)
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    await push.finish()
    assert receiver.read(0, 4) == b"next"
    push.release(nothing)
    ticket.release()


async def test_a_poisoned_session_is_never_written_again(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    push = await open_push(sender, ticket)
    sender.transfer.plane.poisoned.add(push.region["session"])
    push.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(Exception, match="lost a write before"):
        await push.finish()
    push.release(nothing)
    ticket.release()


def packed(*spans):
    return pack(np.array(spans))


async def test_a_peer_scatters_only_its_own_slot_into_its_own_spans(pair):
    _, receiver = pair
    plane = receiver.transfer.plane
    ticket = reserve(receiver, [(100, 100)])
    ticket.offer()
    mine = {"ticket": ticket.id}
    (first, *_) = (await plane.answer(mine | {"type": "lease", "count": 1}))["offsets"]
    plane.landing.array[first : first + 3] = (1, 2, 3)
    scatter = mine | {"type": "scatter", "offset": first}
    assert await plane.answer(scatter | {"spans": packed([100, 2], [199, 1])}) == {}
    assert receiver.read(100, 2) + receiver.read(199, 1) == b"\x01\x02\x03"
    for spans in (packed([99, 1]), packed([199, 2]), packed([-1, 1]), packed([100, 2**62]), b"all", [[100, 1]]):
        with pytest.raises(LayoutMismatch):
            await plane.answer(scatter | {"spans": spans})
    for offset in (first + 1, first + plane.landing.size, 2**40):
        with pytest.raises(LayoutMismatch, match="slot"):
            await plane.answer(scatter | {"offset": offset, "spans": packed([100, 1])})
    for body in ({}, {"type": "lease"}, {"type": "format"}, mine | {"type": "lease", "count": 10**9}):
        with pytest.raises(LayoutMismatch, match="malformed"):
            await plane.answer(body)
    assert plane.landing.leased == 1
    ticket.release()
    assert plane.landing.leased == 0
    with pytest.raises(TransferCancelled):
        await plane.answer(scatter | {"spans": b""})
    assert receiver.transfer.audit() == IDLE
