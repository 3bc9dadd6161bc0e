"""Whether an engine should turn from prefill to decode or back, and with --switch-roles seeing to it. Turns nothing
itself: `switching` does.

An advice is followed when it gains enough, the fleet needs it, it has stood for a while, and nothing was turned lately:
what is measured right after a switch still tells of the fleet before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

from proxy.advice.capacity import Carried, Move, Offered, best_move
from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Ledger
from proxy.core import Instance, Role
from proxy.errors import ProxyError
from proxy.switching import Switching

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_GAIN = 1.2  # times what the fleet carries: less may be an error of measurement
_ROOM = 1.5  # times what is offered: a fleet that carries more needs nothing
_STANDS = 0.25  # of the interval between two switches, until an advice is followed


class Sized(Protocol):
    """What is asked of a fleet and what its engines carry, as `sizing` learns it."""

    def offered(self) -> Offered: ...
    def carried(self) -> Carried: ...


@dataclass(frozen=True, slots=True)
class Advice:
    """Which engine should turn, and what for."""

    instance: Instance
    move: Move
    is_needed: bool  # whether it gains so much, and the fleet has so little room, that it is worth a drain

    @property
    def json(self) -> Mapping[str, Any]:
        """As GET /plan has it."""
        move = self.move
        roles = {"from": move.source.label, "to": move.target.label}
        return {"url": self.instance.url, **roles, "would_carry": move.would_carry}


class Rebalancing:
    """One per worker, of which one runs."""

    def __init__(
        self,
        sizing: Sized,
        fleet: Fleet,
        ledger: Ledger,
        switching: Switching,
        clock: Callable[[], float],
        interval: float | None,
    ) -> None:
        """`interval`: seconds between two switches at the least; None: nothing is turned."""
        self._sizing = sizing
        self._fleet = fleet
        self._ledger = ledger
        self._switching = switching
        self._clock = clock
        self.interval = interval
        self._turned = -inf  # when something was on its way to another role for the last time
        self._standing: tuple[Role, Role] | None = None  # from and to, of the advice that stands
        self._since = -inf

    def advice(self) -> Advice | None:
        """The one switch by which the fleet would carry most; None if by none it would carry more, or nobody can turn
        so."""
        offered = self._sizing.offered()
        try:
            move = best_move(offered, self._sizing.carried())
        except ValueError:
            return None
        instance = None if move is None else self._least_loaded(move)
        if move is None or instance is None:
            return None
        is_needed = move.would_carry >= _GAIN * move.carries and move.carries < _ROOM * offered.requests
        return Advice(instance, move, is_needed)

    def due(self) -> Advice | None:
        """The advice to follow now, if there is one. To be asked again and again."""
        now = self._clock()
        if any(instance.switch is not None for instance in self._fleet):
            self._turned = now
        advice = None if self.interval is None else self.advice()
        standing = None if advice is None or not advice.is_needed else (advice.move.source, advice.move.target)
        if standing != self._standing:
            self._standing, self._since = standing, now
        if self.interval is None or standing is None or now - self._since < _STANDS * self.interval:
            return None
        return advice if now - self._turned >= self.interval else None

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if (advice := self.due()) is not None:
                await self._follow(advice)

    async def _follow(self, advice: Advice) -> None:
        move = advice.move
        gain = f"the fleet would carry {move.would_carry:.3g} requests/s instead of {move.carries:.3g}"
        log.info("%s is to turn from %s to %s: %s", advice.instance.netloc, move.source.label, move.target.label, gain)
        try:
            await self._switching.switch(advice.instance, move.target)
        except ProxyError as error:
            log.warning("%s did not turn: %s", advice.instance.netloc, error)
        self._turned = self._clock()

    def _least_loaded(self, move: Move) -> Instance | None:
        """Who can turn, and has the least to end first."""
        able = [i for i in self._fleet.ready(move.source) if self._switching.refusal(i, move.target) is None]
        return min(able, key=lambda instance: (self._ledger.load(instance.url), instance.url), default=None)
