"""The probe clock: who is alive, and what it says it is. Takes no part in requests, and judges no failed leg."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Event, Fleet
from proxy.breaker import Breakers, Circuit
from proxy.core import Instance, State
from proxy.dialects import ENGINES
from proxy.errors import EngineFailed, Unreachable
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

_AWAITED_INTERVAL_S = 0.25  # an engine that starts, or starts again, is asked more often: requests wait for it


class Unfit(Exception):
    """The engine answers but cannot be used in its list."""


@dataclass(frozen=True, slots=True)
class Probing:
    interval: float
    timeout: float
    failures: int  # in a row, until an instance is DOWN


class Health:
    def __init__(
        self, fleet: Fleet, balancer: Balancer, breakers: Breakers, upstream: Upstream, probing: Probing
    ) -> None:
        self._fleet = fleet
        self._breakers = breakers
        self._balancer = balancer
        self._upstream = upstream
        self._probing = probing
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
        """Probe for ever."""
        while True:
            self._wake.clear()
            await self.tick()
            awaited = any(instance.state in (State.JOINING, State.DOWN) for instance in self._fleet)
            pause = min(_AWAITED_INTERVAL_S, self._probing.interval) if awaited else self._probing.interval
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def tick(self) -> None:
        """One probe of every instance, all at once; then the drained ones that are idle leave."""
        async with asyncio.TaskGroup() as group:
            for instance in self._fleet:
                group.create_task(self._probe(instance))
        for instance in self._fleet:
            if instance.state is State.DRAINING and not self._balancer.ledger.leases(url=instance.url):
                self._apply(instance, Event.IDLE, "drained")
                self._balancer.forget(instance)
                self._breakers.forget(instance.url)

    async def _probe(self, instance: Instance) -> None:
        try:
            status, _ = await self._upstream.get(instance, "/health", self._probing.timeout)
            if status != 200:
                raise Unfit(f"GET /health answers {status}")
            if instance.state is not State.READY:
                await self._introduce(instance)
        except Unreachable as error:
            instance.failures = self._probing.failures  # nobody listens: asking again would tell nothing new
            self._failed(instance, str(error))
        except (EngineFailed, Unfit) as error:
            self._failed(instance, str(error))
        else:
            instance.failures = 0
            if instance.state is State.DOWN:
                self._breakers.forget(instance.url)  # another process, most likely
            self._apply(instance, Event.HEALTHY, "healthy")

    def _failed(self, instance: Instance, reason: str) -> None:
        instance.failures += 1
        if instance.state is State.JOINING:
            if instance.reason != reason:
                log.info("%s %s is not ready: %s", instance.role.label, instance.netloc, reason)
            instance.reason = reason
        elif instance.failures >= self._probing.failures or self.circuit(instance) is not Circuit.CLOSED:
            self._apply(instance, Event.FAILED, reason)  # once is enough where legs have failed as well

    async def _introduce(self, instance: Instance) -> None:
        """Ask an engine what it is before it may serve. Raises Unfit, EngineFailed."""
        status, answer = await self._upstream.get(instance, "/info", self._probing.timeout)
        info = _info(answer) if status == 200 else {}
        found = ENGINES.get(str(info.get("engine")))
        if instance.dialect == "auto":
            if found is None:
                known = ", ".join(sorted(ENGINES))
                raise Unfit(f"GET /info names no engine that is known here ({known}): give its dialect in the URL")
            instance.dialect = found
        role = info.get("role")
        if found is not None and role != instance.role.label:
            raise Unfit(f"it is started with the role {role!r}, but listed as {instance.role.label!r}")
        instance.model = str(info.get("model") or instance.model)

    def _apply(self, instance: Instance, event: Event, reason: str) -> None:
        if instance.state is State.GONE:
            return  # removed while it was probed
        before = instance.state
        if self._fleet.apply(instance, event, reason):
            level = logging.WARNING if instance.state is State.DOWN else logging.INFO
            log.log(level, "%s %s: %s → %s (%s)", instance.role.label, instance.netloc, before, instance.state, reason)


def _info(answer: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
