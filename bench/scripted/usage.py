"""What a tree of processes has used: CPU time, memory, descriptors. Linux only; needs no rights over own children."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PARENT, _CHILDREN_USER, _CHILDREN_SYSTEM = 1, 13, 14  # fields of /proc/PID/stat behind the command's name
_PEAK_RESET = "5"  # proc(5), clear_refs: VmHWM begins again at what is resident now


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants alive now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[_PARENT]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads, ended ones too, and of reaped children."""
    return sum(_own(pid) + _reaped(pid) for pid in pids)


def _own(pid: int) -> float:
    """From the process's CPU clock: /proc counts the same in ticks of 10 ms, too coarse for a short run.

    The number of another process's clock is what `clock_getcpuclockid` (3) computes.
    """
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def _reaped(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[_CHILDREN_USER]) + int(fields[_CHILDREN_SYSTEM])) / _TICKS if fields else 0.0


def reset_peak(pids: Iterable[int]) -> None:
    """`peak_bytes` counts from now on."""
    for pid in pids:
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text(_PEAK_RESET)


def peak_bytes(pids: Iterable[int]) -> int:
    """The sum of each process's largest resident size."""
    return sum(_status(pid, "VmHWM") for pid in pids)


def resident_bytes(pids: Iterable[int]) -> int:
    return sum(_status(pid, "VmRSS") for pid in pids)


def descriptors(pids: Iterable[int]) -> dict[str, int]:
    """Open file descriptors, and how many of them are sockets."""
    targets = [target for pid in pids for target in _links(Path(f"/proc/{pid}/fd"))]
    return {"fds": len(targets), "sockets": sum(target.startswith("socket:") for target in targets)}


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and every process started by it within, run on `core`; afterwards where they were before."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> tuple[int, int]:
    """A core for the proxy and another for everything else; the same one where there is no other."""
    found = sorted(os.sched_getaffinity(0))
    return found[0], found[-1]


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []  # it has ended
    return text.rpartition(")")[2].split()


def _status(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def _links(folder: Path) -> Iterator[str]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):
            yield str(entry.readlink())
