"""What a request may expect now, and of idle engines: for whoever admits it. Charges nothing, chooses nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from proxy.admission import Outlook
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.core import BOTH, Job, Role, Stage
from proxy.errors import ProxyError
from proxy.plan import Planner
from proxy.sizing import Sizing

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

    def of(self, job: Job) -> Outlook:
        """Nothing is foreseen where nobody can serve it: whoever plans says so."""
        now = self._clock()
        try:
            first, first_idle = self._planner.foresee(job, now), self._idle.foresee(job, now)
            # As if all its items were encoded.
            prefilled = self._planner.foresee(replace(job, items=(), text_tokens=job.prompt_tokens), now)
        except ProxyError:
            return _UNKNOWN
        stage = Stage.ENCODE if first > prefilled else Stage.PREFILL
        pacing = self._sizing.pacing()
        pace, pace_idle = pacing.of(self._batch()), pacing.of(1)
        return Outlook(first, first_idle, pace, pace_idle, stage, self._planner.has_room(job, now))

    def _batch(self) -> int:
        """How many the engine would decode at once that decodes the fewest."""
        answering = self._fleet.ready(Role.DECODE) or self._fleet.ready(BOTH)
        return 1 + min((self._balancer.ledger.leases(url=instance.url) for instance in answering), default=0)
