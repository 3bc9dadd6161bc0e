"""What a request may expect now, and of idle engines: for whoever admits it. Charges nothing, chooses nobody."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.admission import Outlook
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.core import BOTH, Job, Role, Stage
from proxy.sizing import Sizing

_UNKNOWN = Outlook(0.0, 0.0, 0.0, 0.0, Stage.PROXY)


class Outlooks:
    def __init__(self, fleet: Fleet, balancer: Balancer, sizing: Sizing) -> None:
        self._fleet = fleet
        self._balancer = balancer
        self._idle = Balancer({}, None, balancer.rates)  # of a fleet that does nothing
        self._sizing = sizing

    def of(self, job: Job) -> Outlook:
        """Nothing is foreseen where no engine is ready: whoever plans says so."""
        pools = {role: Pool(self._fleet.ready(role)) for role in (Role.ENCODE, Role.PREFILL, Role.DECODE, BOTH)}
        reader = Role.PREFILL if pools[Role.PREFILL] else BOTH
        answering = pools[Role.DECODE] if reader is Role.PREFILL else pools[BOTH]
        if not pools[reader] or not answering:
            return _UNKNOWN
        first, encoding = _first(self._balancer, job, pools, reader)
        first_idle, _ = _first(self._idle, job, pools, reader)
        pacing = self._sizing.pacing()
        batch = 1 + min(self._balancer.ledger.leases(url=url) for url in answering)
        stage = Stage.ENCODE if encoding else Stage.PREFILL
        return Outlook(first, first_idle, pacing.of(batch), pacing.of(1), stage)


def _first(balancer: Balancer, job: Job, pools: Mapping[Role, Pool], reader: Role) -> tuple[float, bool]:
    """Seconds to the first token, and whether it waits for embeddings longer than for prefill."""
    demand = Demand(max(1, job.prompt_tokens))
    prefilled = balancer.foresee(reader, pools[reader], demand)
    if not job.items or not pools[Role.ENCODE]:
        return prefilled, False
    works = [item.work for item in job.items]
    share = max(*works, -(-sum(works) // len(pools[Role.ENCODE])))
    ready = balancer.foresee(Role.ENCODE, pools[Role.ENCODE], Demand(share))
    first = balancer.foresee(reader, pools[reader], demand._replace(ready=ready))
    return first, first > prefilled
