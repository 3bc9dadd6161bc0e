"""A leg's instance and its lease in one step, so that no other choice sees a load in between. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.balancer.board import Board
from proxy.balancer.caches import CAPACITY, Holders, hit
from proxy.balancer.foresight import soonest
from proxy.balancer.ledger import Lease, Ledger, Listener
from proxy.balancer.pace import TOKEN
from proxy.balancer.policy import Demand, Policy
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, Instance, Role
from proxy.record import Choice

PRIORS = {Role.ENCODE: 15e-6, Role.PREFILL: 25e-6, Role.DECODE: TOKEN, BOTH: 25e-6}
"""Seconds per token of work: a vision token of Qwen3-VL at 720p on an H100; of a 7B model, a token of prefill, and
one of KV that is read."""

_JOINED = Choice((), (), "", joined=True)


class Balancer:
    """One policy and one set of rates per role, one ledger for all; with a shared board, one truth for all workers."""

    def __init__(
        self, policies: Mapping[Role, Policy], board: Board | None = None, rates: Mapping[Role, Rates] | None = None
    ) -> None:
        self._policies = policies
        self.rates = rates or {role: Rates(prior) for role, prior in PRIORS.items()}
        self.ledger = Ledger(_listeners(policies), board)
        self.holders = Holders()  # of items, among the encoders
        self.explains = True  # whether leases tell how they were chosen: half a microsecond each

    def choose_by(self, policies: Mapping[Role, Policy]) -> None:
        """Have other policies choose from now on. Leases stay, and so does what was learnt."""
        self._policies = policies
        self.ledger.listeners = _listeners(policies)

    def take(self, role: Role, pool: Pool, demand: Demand) -> Lease:
        """Choose one of `pool` (not empty) and charge it. The caller owns the lease."""
        if demand.key and role is Role.ENCODE:
            return self._take_item(pool, demand)
        policy = self._policies[role]
        url = policy.choose(pool, demand, self.ledger)
        choice = self._choice(policy, pool)
        lease = self.ledger.lease(pool.by_url[url], role, demand.at(url))
        lease.choice = choice
        return lease

    def _take_item(self, pool: Pool, demand: Demand) -> Lease:
        """An item is encoded once, however many requests have it at the same time; a held one costs what it does,
        whoever is chosen and for whatever reason."""
        policy, holders, key = self._policies[Role.ENCODE], self.holders, demand.key
        url = holders.flying(key, pool) if policy.joins else None
        if url is None:
            url = policy.choose(pool, self._informed(demand), self.ledger)
            choice = self._choice(policy, pool)
        else:
            choice = _JOINED
        instance, left = pool.by_url[url], demand.at(url)
        if holders.placed(url, key, demand.room or demand.work, instance.facts.get("cache_tokens", CAPACITY)):
            left = min(left, hit(demand.work))
        lease = self.ledger.lease(instance, Role.ENCODE, left)
        lease.also = holders.began(url, key)
        lease.choice = choice
        return lease

    def _choice(self, policy: Policy, pool: Pool) -> Choice | None:
        """What `policy` has chosen by a moment ago, before anything is charged; None where there was no choice."""
        if len(pool.urls) == 1 or not self.explains:
            return None
        if policy.times is not None:
            return Choice(pool.urls, policy.times, "seconds")
        return Choice(pool.urls, self.ledger.loads(pool), "tokens")

    def _informed(self, demand: Demand) -> Demand:
        """With those who hold the item: they answer at once, whatever they encode meanwhile."""
        work, key, held, ready, transfer, room, _ = demand
        found = self.holders.held(key, work)
        if not found:
            return demand
        return Demand(work, key, {**found, **held} if held else found, ready, transfer, room, True)

    def foresee(self, role: Role, pool: Pool, demand: Demand) -> float:
        """Seconds until the leg would be done where that is soonest. Nothing is charged; `pool` is not empty."""
        if role is Role.ENCODE and demand.key:
            demand = self._informed(demand)
        return soonest(pool, demand, self.ledger, self.rates[role])

    def forget(self, instance: Instance) -> None:
        for rates in self.rates.values():  # it may have had other roles
            rates.forget(instance.url)
        self.holders.forget(instance.url)


def _listeners(policies: Mapping[Role, Policy]) -> dict[Role, Listener]:
    return {role: one.changed for role, one in policies.items() if one.listens}
