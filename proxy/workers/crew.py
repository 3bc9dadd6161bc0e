"""What the workers of one proxy share, and each one's place in it. Starts no process: `workers` does.

    roster        the fleet, and where each instance stands
    board         loads, turns
    flow          what was asked
    heartbeats    who is alive
    history       what has ended
    quota         what API keys have used
    reloads       how configurations were taken

Beside the memory there is a folder for the sockets between workers and for their counters, gone with the supervisor or,
if that was killed, with the workers.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from proxy import reloading
from proxy.advice import flow
from proxy.advice.flow import Flow
from proxy.advice.rebalancing import Rebalancing
from proxy.auth import quota
from proxy.auth.quota import Quota
from proxy.balancer import board, roster
from proxy.balancer.board import Board
from proxy.balancer.roster import Roster
from proxy.core import Instance, State
from proxy.discovery.watching import Discovery
from proxy.health import Health
from proxy.joining import heartbeats
from proxy.joining.heartbeats import Heartbeats
from proxy.reloading import Reloads
from proxy.telemetry import history, tally
from proxy.telemetry.history import History
from proxy.workers.segment import Segment
from proxy.workers.siblings import Siblings

_FLEET, _ROWS, _PROBES, _BEATS, _QUOTA = range(5)  # the segment's locks
_LOOK_S = 0.1  # how often the one who probes looks for what others have done to the fleet

Told = Callable[[Instance, State], None]


@dataclass(frozen=True, slots=True)
class Crew:
    """The memory and the folder of `workers` processes."""

    workers: int
    segment: Segment
    folder: Path

    @classmethod
    def create(cls, workers: int) -> Crew:
        segment = Segment.create(sum(_sizes(workers).values()))
        return cls(workers, segment, Path(tempfile.mkdtemp(prefix="triptych-")))

    def fleet(self, told: Told = lambda instance, before: None) -> Roster:
        return Roster(self.segment.buffer, lambda: self.segment.locked(_FLEET), told)

    def board(self, worker: int) -> Board:
        return Board(self._part("board"), self.workers, worker, lambda: self.segment.locked(_ROWS))

    def flow(self, worker: int) -> Flow:
        return Flow(self._part("flow"), self.workers, worker)

    def heartbeats(self) -> Heartbeats:
        return Heartbeats(self._part("heartbeats"), lambda: self.segment.locked(_BEATS))

    def history(self, worker: int) -> History:
        return History(self._part("history"), self.workers, worker)

    def reloads(self) -> Reloads:
        return Reloads(self._part("reloads"))

    def publish(self, text: str) -> None:
        """This is the configuration of all workers from now on."""
        fresh = self.folder / "configuration.new"
        fresh.write_text(text, "utf-8")
        fresh.rename(self._published)

    def published(self) -> str | None:
        """The latest; None while all go by the one that they were started with."""
        return self._published.read_text("utf-8") if self._published.exists() else None

    @property
    def _published(self) -> Path:
        return self.folder / "configuration"

    def quota(self, worker: int) -> Quota:
        return Quota(self._part("quota"), self.workers, worker, lambda: self.segment.locked(_QUOTA))

    def _part(self, name: str) -> memoryview:
        sizes = _sizes(self.workers)
        begin = sum(size for _, size in takewhile(lambda part: part[0] != name, sizes.items()))
        return self.segment.buffer[begin : begin + sizes[name]]

    def lost(self, worker: int) -> None:
        """A worker is dead: its leases and its keys' places are given back, and what it had in flight is over."""
        self.board(worker).clear(worker)
        self.quota(worker).clear(worker)
        tally.bury(self.folder, worker)

    def remove(self) -> None:
        """Nothing is left behind. The memory has no name and goes with its last user."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sizes(workers: int) -> dict[str, int]:
    """Bytes of each part of the memory, in their order."""
    return {
        "roster": roster.SIZE,
        "board": board.size(workers),
        "flow": flow.size(workers),
        "heartbeats": heartbeats.SIZE,
        "history": history.size(workers),
        "quota": quota.size(workers),
        "reloads": reloading.SIZE,
    }


class Seat:
    """One worker's place."""

    def __init__(self, crew: Crew, worker: int, port: int, life: int, ready: Callable[[], None]) -> None:
        """`life`: a descriptor that ends when the supervisor does. `ready`: to be called once the worker serves."""
        self.worker = worker
        self.port = port
        self.admin_port: int | None = None  # to be set before it serves; None: admins are served with clients
        self.ready = ready
        self.folder = crew.folder
        self.siblings = Siblings(crew.folder, crew.workers, worker)
        self._crew = crew
        self._life = life
        self._fleet = crew.fleet()
        self._orphan = False

    def __repr__(self) -> str:
        return f"<Seat {self.worker} of {self._crew.workers} on port {self.port}>"

    def board(self) -> Board:
        return self._crew.board(self.worker)

    def flow(self) -> Flow:
        return self._crew.flow(self.worker)

    def heartbeats(self) -> Heartbeats:
        return self._crew.heartbeats()

    def history(self) -> History:
        return self._crew.history(self.worker)

    def quota(self) -> Quota:
        return self._crew.quota(self.worker)

    def published(self) -> str | None:
        """The configuration that the supervisor has taken last; None if that is the first."""
        return self._crew.published()

    def fleet(self, told: Told) -> Roster:
        """This worker's look at the fleet; `told` as a Roster's."""
        self._fleet = self._crew.fleet(told)
        return self._fleet

    def watch(self, orphaned: Callable[[], None]) -> None:
        """Call `orphaned` when the supervisor is gone."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(self._life)
            self._orphan = True
            orphaned()

        loop.add_reader(self._life, ended)

    def leave(self) -> None:
        """The worker's last act: without a supervisor, nobody else tidies up."""
        if self._orphan:
            self._crew.remove()

    async def probe(self, health: Health, discovery: Discovery, rebalancing: Rebalancing) -> None:
        """Runs them in one worker at a time: N workers that probe would be N times the load on engines, and
        disagree. Whoever has the lock probes, and what he finds is in the fleet that all see; when he dies the kernel
        passes the lock on to the first who asks."""
        segment = self._crew.segment
        try:
            while not segment.claim(_PROBES):  # noqa: ASYNC110 - a killed process sets no event
                await asyncio.sleep(_LOOK_S)
            async with asyncio.TaskGroup() as group:
                group.create_task(health.run())
                group.create_task(discovery.run())
                group.create_task(rebalancing.run())
                group.create_task(_follow(self._fleet, health))
        finally:
            segment.disclaim(_PROBES)


async def _follow(fleet: Roster, health: Health) -> None:
    """No interval is waited for after another worker's change, and what probes learned between is told to all."""
    while True:
        seen = fleet.takeovers
        await asyncio.sleep(_LOOK_S)
        fleet.refresh()
        fleet.share()
        if fleet.takeovers != seen:
            health.wake()
