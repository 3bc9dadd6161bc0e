"""What a request may expect now, and of idle engines: for whoever admits it. Charges nothing, chooses nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from proxy.advice.sizing import Sizing
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.pool import Pool
from proxy.core import BOTH, Job, Role, Stage
from proxy.errors import ProxyError
from proxy.intake.admission import Outlook
from proxy.planning.plan import Planner

_MANY = 1 << 30  # more than anybody serves
_UNKNOWN = Outlook(0.0, 0.0, 0.0, 0.0, Stage.PROXY)


def idle(balancer: Balancer) -> Balancer:
    """One of the same instances, as fast and with the same items in their caches, that have nothing to do."""
    found = Balancer({}, None, balancer.rates)
    found.holders = balancer.holders
    return found


class Outlooks:
    def __init__(
        self,
        planner: Planner,
        idle: Planner,
        fleet: Fleet,
        balancer: Balancer,
        sizing: Sizing,
        clock: Callable[[], float],
    ) -> None:
        """`idle`: plans for the same instances as if they had nothing to do."""
        self._planner = planner
        self._idle = idle
        self._fleet = fleet
        self._balancer = balancer
        self._sizing = sizing
        self._clock = clock
        self._version = -1  # of the fleet that these are of
        self._answering = Pool(())

    def of(self, job: Job) -> Outlook:
        """Nothing is foreseen where nobody can serve it: whoever plans says so."""
        now = self._clock()
        try:
            first, first_idle = self._planner.foresee(job, now), self._idle.foresee(job, now)
            stage = Stage.ENCODE if job.items and first > self._encoded(job, now) else Stage.PREFILL
        except ProxyError:
            return _UNKNOWN
        pacing = self._sizing.pacing()
        pace, pace_idle = pacing.of(self._batch()), pacing.of(1)
        return Outlook(first, first_idle, pace, pace_idle, stage, self._planner.has_room(job, now))

    def _encoded(self, job: Job, now: float) -> float:
        """Seconds to the first token if all items of `job` were encoded already."""
        return self._planner.foresee(replace(job, items=(), text_tokens=job.prompt_tokens), now)

    def _batch(self) -> int:
        """How many the engine would decode at once that decodes the fewest."""
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            self._answering = Pool(self._fleet.ready(Role.DECODE) or self._fleet.ready(BOTH))
        return 1 + int(self._balancer.ledger.running(self._answering).min(initial=_MANY))
