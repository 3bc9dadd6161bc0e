"""A request's plan: route it, choose an instance for every leg, charge them. Synchronous; nothing is sent here."""

from __future__ import annotations

from contextlib import ExitStack

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.core import Instance, Item, Job, Leg, Plan, Role
from proxy.routing import router


def draw(job: Job, fleet: Fleet, balancer: Balancer, leases: ExitStack) -> Plan:
    """The plan for `job` on the instances that are READY now; its leases are entered on `leases`.

    Raises BadRequest or NoInstance; what was leased until then is on `leases` too.
    """
    route = router.route(len(job.items), fleet.census(), job.items[0].param if job.items else None)
    legs: list[Leg] = []
    for role in route.path.roles:
        if role is Role.ENCODE:
            legs += _encode_legs(job, fleet, balancer, leases)
        else:
            lease = leases.enter_context(balancer.take(role, fleet.ready(role), _cost(job, role)))
            legs.append(Leg(role, lease.instance))
    return Plan(route.path, route.reason, tuple(legs))


def _encode_legs(job: Job, fleet: Fleet, balancer: Balancer, leases: ExitStack) -> list[Leg]:
    """One leg per chosen encoder. An item that occurs twice is sent once; the largest items choose first."""
    unique = {item.identity: item for item in reversed(job.items)}
    shares: dict[str, tuple[Instance, list[Item]]] = {}
    for item in sorted(unique.values(), key=lambda item: (-item.tokens, item.index)):
        lease = leases.enter_context(balancer.take(Role.ENCODE, fleet.ready(Role.ENCODE), item.tokens))
        shares.setdefault(lease.instance.url, (lease.instance, []))[1].append(item)
    return [Leg(Role.ENCODE, who, tuple(sorted(items, key=lambda item: item.index))) for who, items in shares.values()]


def _cost(job: Job, role: Role) -> int:
    """Predicted active tokens: decoding keeps the prompt's KV and grows by the output."""
    return job.prompt_tokens + (job.output_tokens if Role.DECODE in role else 0)
