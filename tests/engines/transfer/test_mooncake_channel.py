"""Which way scattered blocks take, and that every way puts them in their places."""

import random

import pytest

from engines.transfer.base import LayoutMismatch
from engines.transfer.mooncake import SLOTS
from engines.transfer.mooncake_channel import Staged
from tests.engines.transfer.nodes import KIB, MIB, nothing, open_push, pattern, reserve

pytest.importorskip("mooncake.engine", reason="Mooncake's libraries are missing", exc_type=ImportError)

BLOCKS = random.Random(3).sample(range(2000), 1400)


@pytest.fixture
async def pair(nodes):
    return await nodes("mooncake", size=40 * MIB), await nodes("mooncake", size=40 * MIB)


@pytest.fixture
def staged(monkeypatch):
    """Counts the staged writes."""
    runs, run = [], Staged.run
    monkeypatch.setattr(Staged, "run", lambda self, *arguments: (runs.append(1), run(self, *arguments))[1])
    return runs


async def push(sender, receiver, source, target):
    data = pattern(sum(length for _, length in source))
    done = 0
    for offset, length in source:
        sender.fill(offset, data[done : done + length])
        done += length
    ticket = reserve(receiver, target)
    outgoing = await open_push(sender, ticket)
    outgoing.write(sender.arena, source, target)
    await outgoing.finish()
    assert b"".join(receiver.read(offset, length) for offset, length in target) == data
    outgoing.release(nothing)
    ticket.release()


SCATTERED = [(block * 16 * KIB, 16 * KIB) for block in BLOCKS]
MOVED = [(39 * MIB - offset, length) for offset, length in SCATTERED]
ONE_RUN = [(MIB, 1400 * 16 * KIB)]


@pytest.mark.parametrize(
    ("source", "target"),
    [(SCATTERED, MOVED), (SCATTERED, ONE_RUN), (ONE_RUN, SCATTERED)],
    ids=["scattered", "gather only", "scatter only"],
)
async def test_many_small_blocks_are_staged(pair, staged, source, target):
    # 22 MiB through two slots of 8 MiB: lanes are used again
    await push(*pair, source, target)
    assert staged == [1]
    assert [node.transfer.plane.staging.leased for node in pair] == [0, 0]


@pytest.mark.parametrize("spans", [ONE_RUN, SCATTERED[:32], [(i * 256 * KIB, 128 * KIB) for i in range(40)]])
async def test_few_or_large_moves_go_directly(pair, staged, spans):
    await push(*pair, spans, spans)
    assert staged == []


async def test_one_free_slot_is_enough(pair, staged):
    sender, receiver = pair
    receiver.transfer.plane.landing.lease("somebody", SLOTS - 1)
    await push(sender, receiver, SCATTERED, MOVED)
    assert staged == [1]
    assert receiver.transfer.plane.landing.leased == SLOTS - 1


@pytest.mark.parametrize("busy", ["staging", "landing"])
async def test_without_a_free_slot_blocks_go_directly(pair, staged, busy):
    sender, receiver = pair
    plane = sender.transfer.plane if busy == "staging" else receiver.transfer.plane
    getattr(plane, busy).lease("somebody", 99)
    await push(sender, receiver, SCATTERED, MOVED)
    assert staged == []


async def test_a_malformed_region_is_refused(pair):
    sender, receiver = pair
    ticket = reserve(receiver, [(0, 4)])
    offer = ticket.offer()
    offer["region"]["slot"] = 0
    outgoing = await sender.transfer.open(offer, timeout=5)
    outgoing.write(sender.arena, [(0, 4)], [(0, 4)])
    with pytest.raises(LayoutMismatch, match="malformed region"):
        await outgoing.finish()
    outgoing.release(nothing)
    ticket.release()
