"""Encoders, prefill and decode chosen together, where bytes travel at different rates between them.

Per place that has a prefill engine, the soonest first token is predicted as if it were prefilled there:

    each item, largest first    argmin over encoders of  pending + work + bytes / link
    prefill                     max(last embedding, pending) + uncached tokens, + all embeddings' transfer
    KV                          bytes / the best link to a decode engine

The place with the least wins, and the policies choose within it. Nothing is charged here. Where all instances have the
same labels, or none, there is nothing to choose, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proxy.balancer.balance import Balancer
from proxy.balancer.caches import hit
from proxy.balancer.foresight import rates_of, times
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.core import Item, Role
from proxy.planning.links import HOP, Links, Place

_FEW = 4  # places with the best prefill engines, and as many near the best encoder; all, in a smaller fleet


@dataclass(frozen=True, slots=True)
class Pools:
    """Who may take each leg of a path; `encoders` and `decoders` None where it has no such leg."""

    role: Role  # of the readers
    readers: Pool  # they prefill
    encoders: Pool | None = None
    decoders: Pool | None = None


class _Map:
    """Where the instances of one pool stand."""

    def __init__(self, pool: Pool) -> None:
        at = [Place.of(pool.by_url[url]) for url in pool.urls]
        self.places = sorted(set(at))
        number = {place: n for n, place in enumerate(self.places)}
        self.index = np.array([number[place] for place in at])
        self.pools = {place: Pool(i for i in pool.by_url.values() if Place.of(i) == place) for place in self.places}
        self.costs: dict[Place, NDArray[np.float64]] = {}  # seconds per byte from each of the pool to a place


class Joint:
    """One for the whole proxy. Maps of pools are kept with the pools."""

    def __init__(self, balancer: Balancer, links: Links) -> None:
        self._balancer = balancer
        self._links = links

    def differ(self, pools: Pools) -> bool:
        """Whether bytes may travel at different rates between these."""
        first = None
        for pool in (pools.readers, pools.encoders, pools.decoders):
            if pool is not None:
                places = self._map(pool).places
                if len(places) != 1 or (first or places[0]) != places[0]:
                    return True
                first = places[0]
        return False

    def place(self, pools: Pools, items: Sequence[Item], demand: Demand, kv: int) -> Place:
        """Where the soonest first token is, with the embeddings of `items` (largest first) and `kv` bytes to decode."""
        return min(self._few(pools, items, demand), key=lambda place: self._seconds(pools, place, items, demand, kv))

    def at(self, pool: Pool, place: Place) -> Pool:
        """Those of `pool` who stand there."""
        return self._map(pool).pools[place]

    def transfer(self, pool: Pool, place: Place, nbytes: int) -> dict[str, float]:
        """Seconds for so many bytes between each of `pool` and an instance at `place`."""
        return dict(zip(pool.urls, (nbytes * self._costs(pool, place)).tolist(), strict=True))

    def seconds(self, one: Place, other: Place, nbytes: int) -> float:
        return nbytes / self._links.rate(one, other)

    # ---- predictions

    def _seconds(self, pools: Pools, place: Place, items: Sequence[Item], demand: Demand, kv: int) -> float:
        moving = 0.0
        if pools.encoders is not None:
            ready, moving = self._encoded(pools.encoders, place, items)
            demand = demand._replace(ready=ready)
        if pools.decoders is not None:
            moving += kv * float(self._costs(pools.decoders, place).min())
        return moving + self._balancer.foresee(pools.role, self.at(pools.readers, place), demand)

    def _encoded(self, encoders: Pool, place: Place, items: Sequence[Item]) -> tuple[float, float]:
        """Seconds until all can be brought to `place`, and to bring them."""
        costs, rates = self._costs(encoders, place), rates_of(encoders, self._balancer.rates[Role.ENCODE])
        pending, holders = self._balancer.ledger.loads(encoders) * rates, self._balancer.holders.holders
        ready = moving = 0.0
        for item in items:
            done = pending + item.work * rates
            held = [encoders.position[url] for url in holders(item.identity) if url in encoders]
            done[held] = hit(item.work) * rates[held]  # it waits for nothing there
            best = int((done + item.nbytes * costs).argmin())
            if best not in held:
                pending[best] = done[best]
            ready = max(ready, HOP + float(done[best]))
            moving += item.nbytes * float(costs[best])
        return ready, moving

    def _few(self, pools: Pools, items: Sequence[Item], demand: Demand) -> Sequence[Place]:
        known, balancer = self._map(pools.readers), self._balancer
        if len(known.places) <= 2 * _FEW:
            return known.places
        found = np.full(len(known.places), np.inf)
        np.minimum.at(found, known.index, times(pools.readers, demand, balancer.ledger, balancer.rates[pools.role]))
        chosen = {*found.argsort(kind="stable")[:_FEW].tolist()}
        if (near := pools.encoders or pools.decoders) is not None:
            role, work = (Role.ENCODE, items[0].work) if near is pools.encoders else (Role.DECODE, demand.work)
            best = times(near, Demand(work), balancer.ledger, balancer.rates[role]).argmin()
            home = self._map(near).places[self._map(near).index[best]]
            away = np.array([1.0 / self._links.rate(place, home) for place in known.places])
            chosen |= {*np.lexsort((found, away))[:_FEW].tolist()}
        return [known.places[number] for number in sorted(chosen)]

    def _costs(self, pool: Pool, place: Place) -> NDArray[np.float64]:
        """Seconds per byte, in the pool's order."""
        known = self._map(pool)
        costs = known.costs.get(place)
        if costs is None:
            by_place = np.array([1.0 / self._links.rate(one, place) for one in known.places])
            costs = known.costs[place] = by_place[known.index]
        return costs

    def _map(self, pool: Pool) -> _Map:
        known: _Map | None = pool.kept.get(_Map)
        if known is None:
            known = pool.kept[_Map] = _Map(pool)
        return known
