import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.scripted import usage

WORK = """
import subprocess, sys, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
burn(0.1)
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"], check=True)
held = bytearray(b"x") * (40 << 20)
del held
child = subprocess.Popen(["sleep", "60"])
print("ready", flush=True)
sys.stdin.read()
child.kill()
child.wait()
"""


@contextmanager
def worker() -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORK], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.communicate("")


def test_a_tree_is_measured_with_what_it_reaped() -> None:
    with worker() as process:
        pids = usage.tree(process.pid)
        assert len(pids) == 2
        assert usage.cpu_seconds(pids) >= 0.1 + 0.3 - 0.02  # the reaped child's is told in ticks
        assert usage.peak_bytes(pids) - usage.resident_bytes(pids) >= 20 << 20
        usage.reset_peak(pids)
        assert usage.peak_bytes(pids) - usage.resident_bytes(pids) < 20 << 20


def test_own_time_is_finer_than_a_tick() -> None:
    before = usage.cpu_seconds([os.getpid()])
    end = time.process_time() + 0.002
    while time.process_time() < end:
        pass
    assert usage.cpu_seconds([os.getpid()]) - before >= 0.002


def test_descriptors_are_counted() -> None:
    before = usage.descriptors([os.getpid()])
    with socket.socket(), socket.socket(), Path(os.devnull).open():
        after = usage.descriptors([os.getpid()])
    assert after["sockets"] - before["sockets"] == 2
    assert after["fds"] - before["fds"] == 3


def test_a_process_that_has_ended_uses_nothing() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    pids = [gone.pid]
    assert usage.tree(gone.pid) == pids
    assert usage.cpu_seconds(pids) == usage.peak_bytes(pids) == usage.resident_bytes(pids) == 0
    assert usage.descriptors(pids) == {"fds": 0, "sockets": 0}
    usage.reset_peak(pids)


def test_pinning_ends() -> None:
    before = os.sched_getaffinity(0)
    first, last = usage.cores()
    assert {first, last} <= before
    with usage.pinned(last):
        assert os.sched_getaffinity(0) == {last}
    assert os.sched_getaffinity(0) == before
