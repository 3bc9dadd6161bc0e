"""The probe clock: who is alive and may serve. Takes no part in requests, and judges no failed leg."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Circuit
from proxy.core import Instance, State, Switch
from proxy.errors import EngineFailed, Unreachable
from proxy.joining import detect
from proxy.joining.introduction import Introduction, Unfit
from proxy.tasks import together
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

_OVERDUE_S = 2.0  # after its deadline, a switch has been undone by whoever saw to it, if anybody is left
_AWAITED_INTERVAL_S = 0.25  # an engine that starts, or starts again, is asked more often: requests wait for it


@dataclass(frozen=True, slots=True)
class Probing:
    interval: float
    timeout: float
    failures: int  # in a row, until an instance is DOWN


class Health:
    def __init__(
        self,
        fleet: Fleet,
        balancer: Balancer,
        breakers: Breakers,
        upstream: Upstream,
        introduce: Introduction,
        probing: Probing,
    ) -> None:
        self._fleet = fleet
        self._breakers = breakers
        self._balancer = balancer
        self._upstream = upstream
        self._introduce = introduce
        self.probing = probing
        self._running: dict[str, asyncio.Task[None]] = {}  # probes by URL
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Probe now: the fleet has changed."""
        self._wake.set()

    def dead(self, instance: Instance, reason: str) -> None:
        """A leg found nobody listening: it is DOWN at once, and probed until somebody does."""
        if instance.state is State.READY:
            self._apply(instance, Event.FAILED, reason)
            self.wake()

    def suspect(self, instance: Instance) -> None:
        """Its circuit has opened: a probe tells whether it is dead, or only unwell."""
        self.wake()

    def circuit(self, instance: Instance) -> Circuit:
        """Whether failed legs keep it from new ones now, as this process has seen them."""
        return self._breakers.circuit(instance.url, time.monotonic())

    async def run(self) -> None:
        """Probe for ever. An engine that takes long to be ready keeps no other waiting."""
        async with together() as group:
            while True:
                self._wake.clear()
                self._start(group)
                await self._wait(self.probing.timeout)
                self._tidy()
                awaited = any(instance.state in (State.JOINING, State.DOWN) for instance in self._fleet)
                pause = min(_AWAITED_INTERVAL_S, self.probing.interval) if awaited else self.probing.interval
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def tick(self) -> None:
        """One probe of every instance, all at once, and what follows from it."""
        await self._wait(None)
        async with together() as group:
            self._start(group)
        self._tidy()

    def _start(self, group: together) -> None:
        """A probe of every instance that is in none."""
        for instance in self._fleet:
            if instance.url not in self._running:
                task = self._running[instance.url] = group.create_task(self._probe(instance))
                task.add_done_callback(lambda _, url=instance.url: self._running.pop(url))  # type: ignore[misc]

    async def _wait(self, seconds: float | None) -> None:
        if self._running:
            await asyncio.wait(self._running.values(), timeout=seconds)

    def _tidy(self) -> None:
        """Those leave that are drained and idle; those are DOWN that can never serve among the others."""
        for instance in self._fleet:
            if instance.state is State.READY and (reason := self._introduce.stray(instance, self._fleet)):
                self._apply(instance, Event.FAILED, reason)
            if instance.switch is not None:
                self._overdue(instance, instance.switch)
            elif instance.state is State.DRAINING and not self._balancer.ledger.leases(url=instance.url):
                self._apply(instance, Event.IDLE, "drained")
                self._balancer.forget(instance)
                self._breakers.forget(instance.url)

    def _overdue(self, instance: Instance, switch: Switch) -> None:
        """Who saw to a switch is dead if it is not over in time: its instance joins again in the role that it has."""
        if time.monotonic() > switch.until + _OVERDUE_S:
            log.warning("nobody sees to the switch of %s any more", instance.netloc)
            self._fleet.rejoin(instance, "nobody saw to its switch any more")

    async def _probe(self, instance: Instance) -> None:
        try:
            status, said = await self._upstream.get(instance, "/health", self.probing.timeout)
            if status != 200:
                raise Unfit(f"GET /health answers {status}")
            if instance.state is State.READY and detect.role_now(said) not in (None, instance.role):
                self._apply(instance, Event.FAILED, "it has turned to another role")
            if instance.state is not State.READY and instance.switch is None:
                await self._introduce(instance, self._fleet)
        except Unreachable as error:
            instance.failures = self.probing.failures  # nobody listens: asking again would tell nothing new
            self._failed(instance, str(error))
        except (EngineFailed, Unfit) as error:
            self._failed(instance, str(error))
        else:
            instance.failures = 0
            if instance.state is State.DOWN:
                self._breakers.forget(instance.url)  # another process, most likely
            if instance.state is not State.DRAINING:  # which has its own reason
                self._apply(instance, Event.HEALTHY, "healthy")

    def _failed(self, instance: Instance, reason: str) -> None:
        instance.failures += 1
        if instance.state is State.JOINING:
            if instance.reason != reason:
                log.info("%s %s is not ready: %s", instance.role.label, instance.netloc, reason)
            instance.reason = reason
        elif instance.failures >= self.probing.failures or self.circuit(instance) is not Circuit.CLOSED:
            self._apply(instance, Event.FAILED, reason)  # once is enough where legs have failed as well

    def _apply(self, instance: Instance, event: Event, reason: str) -> None:
        if instance.state is State.GONE:
            return  # removed while it was probed
        before = instance.state
        if self._fleet.apply(instance, event, reason):
            level = logging.WARNING if instance.state is State.DOWN else logging.INFO
            log.log(level, "%s %s: %s → %s (%s)", instance.role.label, instance.netloc, before, instance.state, reason)
