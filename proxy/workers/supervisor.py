"""The supervisor: N worker processes on one port, replaced when they die, ended with it. It serves nothing itself.

    supervisor ─fork─▶ worker 0 … worker N-1     each listens on the port for itself (SO_REUSEPORT)
               ◀─ready── one byte when a worker serves
               ──life──▶ a pipe that is never written: its end tells a worker that the supervisor is gone

On SIGHUP and each second the supervisor looks for another configuration; where it takes one, SIGHUP tells the workers.

A worker that dies is replaced at once; one that died young waits, for longer each time. What the dead one held of the
engines' load is given back before its successor begins.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from proxy.workers.crew import Crew, Seat

log = logging.getLogger(__name__)

_YOUNG_S = 5.0  # who dies before this age is restarted later each time
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 10.0
_LAST_WORD_S = 5.0  # beyond the grace time, until workers that hang are killed
_LOOK_S = 1.0  # how often another configuration is looked for
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)

Work = Callable[[Seat], None]
"""A worker's whole life."""

Reload = Callable[[bool], bool]
"""Looks for another configuration and takes it; True if workers are to be told. Its argument: whether a signal asked
for that."""


@dataclass(slots=True)
class Worker:
    """One place in the crew, and who sits there."""

    pid: int = 0  # 0: nobody
    born: float = 0.0
    early: int = 0  # deaths in a row at a young age
    due: float = 0.0  # when the next one may begin
    ready: bool = False


class Supervisor:
    def __init__(
        self,
        crew: Crew,
        port: int,
        work: Work,
        serving: Callable[[], None],
        grace: Callable[[], float],
        reload: Reload | None = None,
    ) -> None:
        """`serving` is called once, when every worker serves for the first time; `grace` when they are told to end,
        which they do within so many seconds."""
        self._crew = crew
        self._port = port
        self._work = work
        self._serving = serving
        self._grace = grace
        self._reload = reload
        self._looked = 0.0  # when a configuration was looked for
        self._workers = [Worker() for _ in range(crew.workers)]
        self._ready_read, self._ready_write = os.pipe()
        self._life_read, self._life_write = os.pipe()
        self._signals_read, self._signals_write = socket.socketpair()
        self._stopping: float | None = None  # the time to kill those that are left
        self._served = False
        self._status = 0

    def run(self) -> int:
        """Until SIGTERM or SIGINT, and then until the last worker is gone; the exit status."""
        self._signals_read.setblocking(False)
        self._signals_write.setblocking(False)
        signal.set_wakeup_fd(self._signals_write.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        try:
            while self._stopping is None or any(worker.pid for worker in self._workers):
                self._start_those_due()
                self._wait()
                self._look()
                self._reap()
            return self._status
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            for end in (self._ready_read, self._ready_write, self._life_read, self._life_write):
                os.close(end)
            self._signals_read.close()
            self._signals_write.close()

    # ---- waiting for signals and for workers that are ready

    def _wait(self) -> None:
        signals = self._signals_read.fileno()
        readable, _, _ = select.select([signals, self._ready_read], [], [], self._pause())
        if self._ready_read in readable:
            for worker in os.read(self._ready_read, 4096):
                self._workers[worker].ready = True
            if not self._served and all(worker.ready for worker in self._workers):
                self._served = True
                self._serving()
        if signals in readable:
            numbers = self._signals_read.recv(4096)
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                self._stop()
            if signal.SIGHUP in numbers:
                self._look(asked=True)
        if self._stopping is not None and time.monotonic() > self._stopping:
            self._signal(signal.SIGKILL)

    def _pause(self) -> float | None:
        """Seconds until something is due without a signal."""
        now = time.monotonic()
        if self._stopping is not None:
            return max(0.1, self._stopping - now)
        due = [worker.due for worker in self._workers if not worker.pid]
        if self._reload is not None:
            due.append(self._looked + _LOOK_S)
        return max(0.0, min(due) - now) if due else None

    def _look(self, asked: bool = False) -> None:
        """For another configuration, if it is time to."""
        now = time.monotonic()
        if self._reload is not None and self._stopping is None and (asked or now >= self._looked + _LOOK_S):
            self._looked = now
            if self._reload(asked):
                self._signal(signal.SIGHUP)

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = time.monotonic() + self._grace() + _LAST_WORD_S
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, number)  # not reaped yet, so the number is still its own

    # ---- births and deaths

    def _start_those_due(self) -> None:
        if self._stopping is None:
            for place, worker in enumerate(self._workers):
                if not worker.pid and worker.due <= time.monotonic():
                    self._start(place, worker)

    def _start(self, place: int, worker: Worker) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        worker.born, worker.ready = time.monotonic(), False
        try:
            worker.pid = os.fork()
        except OSError as error:  # no memory or no process to be had now
            log.error("worker %d cannot be started: %s", place, error.strerror)
            worker.due = worker.born + _LONGEST_DELAY_S
            return
        if worker.pid == 0:
            self._be(place)

    def _be(self, place: int) -> None:
        """The child's whole life: nothing of the supervisor's runs in it, on no way out."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is ready to follow
            os.close(self._life_write)
            os.close(self._ready_read)
            self._work(Seat(self._crew, place, self._port, self._life_read, lambda: self._tell_ready(place)))
            status = 0
        except BaseException:  # noqa: BLE001 - the edge of the process: whatever it was, fork's other half must not go on
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _tell_ready(self, place: int) -> None:
        os.write(self._ready_write, bytes([place]))

    def _reap(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker.pid and (ended := os.waitpid(worker.pid, os.WNOHANG))[0]:
                self._ended(place, worker, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, place: int, worker: Worker, status: int) -> None:
        now = time.monotonic()
        pid, worker.pid = worker.pid, 0
        self._crew.lost(place)
        if self._stopping is not None:
            self._status = self._status or int(status != 0)
            return
        if status > 0 and not self._served:
            log.error("worker %d cannot start", place)
            self._status = 1
            self._stop()
            return
        worker.early = worker.early + 1 if now - worker.born < _YOUNG_S else 0
        delay = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (worker.early - 2)) if worker.early > 1 else 0.0
        worker.due = now + delay
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        log.error("worker %d (pid %d) %s; the next one begins in %.1f s", place, pid, how, delay)


def reserve(host: str, port: int) -> list[socket.socket]:
    """Sockets that keep the port for the workers and take no connection. Raises OSError if somebody listens there.

    All of SO_REUSEPORT's sockets belong to one user, so another proxy of this user would share the port silently:
    binding without the option first finds it.
    """
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            if port:
                _bound(family, kind, protocol, address, socket.SO_REUSEADDR).close()
            one = _bound(family, kind, protocol, (address[0], port, *address[2:]), socket.SO_REUSEPORT)
            found.append(one)
            port = port or one.getsockname()[1]
    except OSError:
        for one in found:
            one.close()
        raise
    return found


def _bound(family: int, kind: int, protocol: int, address: tuple[object, ...], option: int) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        one.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one
