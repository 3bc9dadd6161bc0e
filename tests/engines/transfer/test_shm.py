import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.transfer import create
from engines.transfer.base import LayoutMismatch, PeerUnreachable, TransferError
from engines.transfer.liveness import here, machine, started
from engines.transfer.plane import Halt
from engines.transfer.shm import FOLDER, ShmPlane, sweep
from tests.engines.transfer.nodes import nothing


class NeverHalt(Halt):
    deadline = 0.0

    def check(self):
        pass


def segments():
    return {path.name for path in FOLDER.glob(f"triptych-{machine()}-{os.getpid()}-*")}


async def test_segments_are_private_and_vanish_at_close():
    transfer = create("shm")
    transfer.allocate("kv", 4096)
    (name,) = segments()
    assert (FOLDER / name).stat().st_mode & 0o777 == 0o600
    await transfer.close()
    assert segments() == set()


async def test_memory_outlives_close_for_those_who_still_look_at_it():
    transfer = create("shm")
    arena = transfer.allocate("kv", 4096)
    view = np.frombuffer(arena.buffer, dtype=np.float32)
    await transfer.close()
    view[:] = 1.0
    assert view.sum() == 1024


def test_no_resource_tracker_and_no_warning_in_a_process_that_exits_without_closing():
    code = "from engines.transfer import create; create('shm').allocate('kv', 4096)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    assert sweep()


def test_sweeping_takes_only_what_dead_processes_of_this_machine_left(tmp_path):
    ours = f"triptych-{machine()}-{os.getpid()}-{started(os.getpid())}-{'0' * 16}"
    reused_pid = f"triptych-{machine()}-{os.getpid()}-1-{'0' * 16}"
    elsewhere = f"triptych-{'f' * 16}-{os.getpid()}-1-{'0' * 16}"
    for name in (ours, reused_pid, elsewhere, "triptych-notes.txt", "other"):
        (tmp_path / name).touch()
    assert sweep(tmp_path) == [reused_pid]
    assert {path.name for path in tmp_path.iterdir()} == {ours, elsewhere, "triptych-notes.txt", "other"}


def test_memory_that_does_not_fit_is_an_error_now_and_leaves_nothing():
    with pytest.raises(TransferError, match="shm-size"):
        ShmPlane().allocate("kv", 1 << 50)
    assert segments() == set()


@pytest.mark.parametrize("segment", [None, "../../etc/passwd", "triptych-x", 7])
def test_a_description_cannot_name_other_files(segment):
    plane = ShmPlane()
    arena = plane.allocate("kv", 4096)
    channel = plane.connect(here("127.0.0.1", 1), 1)
    with pytest.raises(LayoutMismatch, match="does not name"):
        channel.write(arena, {"segment": segment}, np.array([[0, 0, 4]]), NeverHalt())
    plane.close()


def test_a_segment_that_is_gone_or_too_small_is_refused():
    plane = ShmPlane()
    arena = plane.allocate("kv", 4096)
    channel = plane.connect(here("127.0.0.1", 1), 1)
    with pytest.raises(LayoutMismatch, match="only 4096 bytes"):
        channel.write(arena, {"segment": arena.segment}, np.array([[0, 4095, 2]]), NeverHalt())
    gone = arena.segment[:-16] + "0" * 16
    with pytest.raises(PeerUnreachable, match="run as one user"):
        channel.write(arena, {"segment": gone}, np.array([[0, 0, 4]]), NeverHalt())
    plane.close()


def test_another_machine_is_out_of_reach():
    address = here("127.0.0.1", 1)
    other = type(address)(address.host, 1, address.nonce, "other", 1, 1)
    with pytest.raises(PeerUnreachable, match="another machine"):
        ShmPlane().connect(other, 1)


async def test_a_closed_transfer_that_nobody_holds_leaves_nothing_mapped():
    sender, receiver = create("shm"), create("shm")
    theirs, ours = receiver.allocate("arena", 4096), sender.allocate("arena", 4096)
    names = {theirs.segment, ours.segment}
    await sender.start()
    await receiver.start()
    ticket = receiver.reserve(theirs, [(0, 4)], timeout=10, on_free=nothing)
    push = await sender.open(ticket.offer(), timeout=10)
    push.write(ours, [(0, 4)], [(0, 4)])
    await push.finish()
    push.release(nothing)
    ticket.release()
    await sender.close()
    await receiver.close()
    assert mapped() >= names
    del sender, receiver, theirs, ours, ticket, push
    gc.collect()
    assert not mapped() & names


def mapped():
    """Names of the segments that this process has mapped, unlinked ones too."""
    return set(re.findall(r"triptych-[0-9a-f-]+", Path("/proc/self/maps").read_text()))
