"""An instance's way from one pool to another: drained here, turned by the engine, taken in again with its new role.

    READY ──▶ DRAINING ──no lease──▶ POST /role at the engine ──▶ JOINING ──▶ READY
                  └──too late, the engine refuses or dies, whoever asked has gone──▶ JOINING ──▶ READY, as it was

Meanwhile the fleet tells all workers of it. If the worker that sees to it dies, its call of the engine ends, and with
it the engine's part; `health` lets the instance join again when the time is up. Who joins is asked for its role, so it
does not matter what is believed here of an engine whose answer was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import orjson

from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Ledger
from proxy.core import Instance, Role, Stage, State, Switch
from proxy.errors import Broken, Conflict, StageTimeout
from proxy.routing import router
from proxy.upstream import Upstream

log = logging.getLogger(__name__)

DIALECT = "native"
"""Whose engines can turn from one role to another."""

_LOOK_S = 0.02
_ANSWER_S = 1.0  # beyond its deadline, for an engine to say that it could not keep it


class Switching:
    """Of all instances; by this worker."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        upstream: Upstream,
        wake: Callable[[], None],
        clock: Callable[[], float],
        timeout: float,
    ) -> None:
        """`wake`: has those who join be probed at once. `timeout`: seconds for a switch that is given no others."""
        self._fleet = fleet
        self._ledger = ledger
        self._upstream = upstream
        self._wake = wake
        self._clock = clock
        self.timeout = timeout

    async def switch(self, instance: Instance, role: Role, seconds: float | None = None, force: bool = False) -> None:
        """Have `instance` turn to `role` within so many seconds; it is JOINING then. At once if it has it already.
        Whatever else ends this has it join again as it was.

        Raises Conflict where it cannot be, StageTimeout, EngineFailed. `force`: even if nobody else has its role.
        """
        if instance.role == role and instance.state is State.READY:
            return
        seconds = seconds or self.timeout
        was, switch = instance.role, Switch(role, self._clock() + seconds)
        with self._fleet.changing():  # two workers must not turn the last two of a role
            if reason := self.refusal(instance, role, force):
                raise Conflict(reason, param="url")
            self._fleet.begin(instance, switch, f"drained, to be {role.label}")
        log.info("%s %s is drained, to be %s", was.label, instance.netloc, role.label)
        reason = f"it could not be turned to {role.label}"
        try:
            await self._idle(instance, switch, seconds)
            await self._turn(instance, switch)
            with self._fleet.changing():
                self._check(instance, switch)
                instance.turn(role)
            reason = f"turned from {was.label} to {role.label}"
        finally:
            log.info("%s: %s", instance.netloc, reason)
            if instance.switch == switch:
                self._fleet.rejoin(instance, reason)
            self._wake()

    def refusal(self, instance: Instance, role: Role, force: bool = False) -> str | None:
        """Why `instance` cannot be turned to `role` now; None if it can."""
        if instance.switch is not None:
            return f"{instance.url} is on its way to {instance.switch.role.label} already"
        if instance.dialect != DIALECT:
            return f"{instance.url} speaks {instance.dialect}: only engines of our own turn to other roles"
        if Role.ENCODE in instance.role | role:
            return f"{instance.url} is {instance.role.label}: only prefill, decode and both turn into each other"
        if instance.state is not State.READY:
            return f"{instance.url} is {instance.state}: {instance.reason}"
        census = self._fleet.census()
        if not force and router.servable(census):
            census[instance.role][State.READY] -= 1
            if not router.servable(census):
                return f"{instance.url} is the last {instance.role.label} engine, without which nobody could be served"
        return None

    async def _idle(self, instance: Instance, switch: Switch, seconds: float) -> None:
        """Until the last request there has ended. Raises StageTimeout, Conflict."""
        while leases := self._ledger.leases(url=instance.url):
            if self._clock() >= switch.until:
                raise StageTimeout(
                    f"{leases} requests at {instance.url} were not over within {seconds:g} s (--switch-timeout): it is "
                    f"{instance.role.label} still",
                    code="switch_timeout",
                )
            await asyncio.sleep(_LOOK_S)
            self._fleet.refresh()
            self._check(instance, switch)

    async def _turn(self, instance: Instance, switch: Switch) -> None:
        """Raises EngineFailed."""
        left = max(_LOOK_S, switch.until - self._clock())
        asked = orjson.dumps({"role": switch.role.label, "timeout": left})
        async with self._upstream.post(instance, Stage.PROXY, "/role", asked, "", left + _ANSWER_S) as answer:
            said = await answer.read()
        try:
            done = orjson.loads(said)["role"] == switch.role.label
        except (orjson.JSONDecodeError, KeyError, TypeError):
            done = False
        if not done:
            raise Broken(f"{instance.url} did not say that it is {switch.role.label}")

    def _check(self, instance: Instance, switch: Switch) -> None:
        """Raises Conflict if somebody has taken the instance elsewhere meanwhile."""
        if instance.switch != switch or self._fleet.get(instance.url) is not instance:
            raise Conflict(f"{instance.url} was drained, removed or registered again meanwhile")
