"""Engines that start in a moment: forks of one process that has imported what takes an engine seconds.

A suite starts some 230 engines, and each would take six seconds of a core for torch and transformers. What a fork runs
is what `python -m engines.language` or `engines.encoder` runs; it has a pid, flags, environment, output, signals and an
end of its own. Its parent is the nursery, a process for each one that tests run in, which it does not outlive.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.processes import LONGEST_LINE, die_with_parent

ROOT = Path(__file__).parents[2]
MODULES = ("engines.language", "engines.encoder")
IMPORTED = ("engines.colocated.build", "engines.tiny")  # of both, and every family's model

Spawn = Callable[[Sequence[str]], Awaitable[Any]]


class Forked:
    """What `asyncio.subprocess.Process` is for a child, for one of the nursery's."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._ended: asyncio.Task[None] | None = None

    def watch(self, status: asyncio.StreamReader) -> None:
        self._ended = asyncio.create_task(self._watch(status))

    async def _watch(self, status: asyncio.StreamReader) -> None:
        self.returncode = int(await status.read() or -signal.SIGKILL)  # empty: the nursery is gone, and it with that

    async def wait(self) -> int:
        assert self._ended is not None
        await asyncio.shield(self._ended)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


class Nursery:
    """For the process that it is made in. Starts with the first engine."""

    def __init__(self, otherwise: Spawn) -> None:
        """`otherwise` starts what is no engine."""
        self._otherwise = otherwise
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._turn = threading.Lock()

    async def spawn(self, command: Sequence[str]) -> Any:
        """See deploy.processes.spawn."""
        if list(command[:2]) != [sys.executable, "-m"] or command[2] not in MODULES:
            return await self._otherwise(command)
        pipes = [os.pipe() for _ in range(3)]  # its output, its errors, its status
        pid = await asyncio.to_thread(self._fork, command[2:], [writing for _, writing in pipes])
        stdout, stderr, status = [await _reader(reading) for reading, _ in pipes]
        forked = Forked(pid, stdout, stderr)
        forked.watch(status)
        return forked

    def close(self) -> None:
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.wait()

    def _fork(self, argv: Sequence[str], fds: list[int]) -> int:
        with self._turn:
            if self._socket is None:
                self._socket = self._started()
            request = {"argv": argv, "cwd": str(Path.cwd()), "environ": dict(os.environ)}
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            for fd in fds:
                os.close(fd)
            return int(self._socket.recv(32))

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        return ours


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0))
    return reader


# ---- in the nursery


def _serve(requests: socket.socket) -> list[str] | None:
    """None at the end; in a fork, what it is to run."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end is the nursery's
    signal.set_wakeup_fd(wake)
    statuses: dict[int, int] = {}  # where each fork's is told, by pid
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(statuses)
        if requests not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not data:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            requests.close()
            return _settled(json.loads(data), fds, [woken, wake, *statuses.values()])
        statuses[pid] = fds.pop()
        for fd in fds:
            os.close(fd)
        requests.send(b"%d" % pid)


def _settled(request: dict[str, Any], fds: Sequence[int], others: Sequence[int]) -> list[str]:
    """A fork with the output, folder and environment that were asked for, and nothing of the nursery's."""
    die_with_parent()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nothing, *fds[:2])):
        os.dup2(fd, number)
    for fd in (nothing, *fds, *others):
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    argv: list[str] = request["argv"]
    return argv


def _reap(statuses: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (told := statuses.pop(pid, None)) is not None:
                with suppress(BrokenPipeError):  # its test has ended, and reads nothing more
                    os.write(told, b"%d" % os.waitstatus_to_exitcode(status))
                os.close(told)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    argv = _serve(requests)
    if argv is not None:
        gc.enable()
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
