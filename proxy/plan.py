"""A request's plan: route it, choose an instance for every leg, charge them. Synchronous; nothing is sent here."""

from __future__ import annotations

from contextlib import ExitStack

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.core import Instance, Item, Job, Leg, Plan, Role
from proxy.routing import router


class Planner:
    """Draws plans on one fleet with one balancer."""

    def __init__(self, fleet: Fleet, balancer: Balancer) -> None:
        self._fleet = fleet
        self._balancer = balancer

    def draw(self, job: Job, leases: ExitStack) -> Plan:
        """The plan for `job` on the instances that are READY now; its leases are entered on `leases`.

        Raises BadRequest or NoInstance; what was leased until then is on `leases` too.
        """
        route = router.route(len(job.items), self._fleet.census(), job.items[0].param if job.items else None)
        legs: list[Leg] = []
        for role in route.path.roles:
            if role is Role.ENCODE:
                legs += self._encode_legs(job, leases)
            else:
                legs.append(Leg(role, self._take(role, _cost(job, role), leases)))
        return Plan(route.path, route.reason, tuple(legs))

    def _encode_legs(self, job: Job, leases: ExitStack) -> list[Leg]:
        """One leg per chosen encoder. An item that occurs twice is sent once; the largest items choose first."""
        unique = {item.identity: item for item in reversed(job.items)}
        shares: dict[str, tuple[Instance, list[Item]]] = {}
        for item in sorted(unique.values(), key=lambda item: (-item.tokens, item.index)):
            instance = self._take(Role.ENCODE, item.tokens, leases)
            shares.setdefault(instance.url, (instance, []))[1].append(item)
        return [
            Leg(Role.ENCODE, instance, tuple(sorted(items, key=lambda item: item.index)))
            for instance, items in shares.values()
        ]

    def _take(self, role: Role, tokens: int, leases: ExitStack) -> Instance:
        return leases.enter_context(self._balancer.take(role, self._fleet.ready(role), tokens)).instance


def _cost(job: Job, role: Role) -> int:
    """Predicted active tokens: decoding keeps the prompt's KV and grows by the output."""
    return job.prompt_tokens + (job.output_tokens if Role.DECODE in role else 0)
