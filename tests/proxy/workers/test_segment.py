"""Memory without a name, and locks that the dead do not keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from proxy.workers.segment import Segment

HOLDER = """
import sys, time
from proxy.workers.segment import Segment
segment = Segment(int(sys.argv[1]))
segment.buffer[0] = 7
print(segment.claim(1), flush=True)
time.sleep(60)
"""


def test_a_lock_is_anothers_until_that_is_killed() -> None:
    named = set(Path("/dev/shm").iterdir())
    segment = Segment.create(4096)
    assert set(Path("/dev/shm").iterdir()) == named
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(segment.fd)], stdout=subprocess.PIPE, pass_fds=(segment.fd,), text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert segment.buffer[0] == 7
        assert not segment.claim(1)
        assert segment.claim(2), "another lock"
        with segment.locked(0):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert segment.claim(1)
    segment.disclaim(1)
    segment.close()
