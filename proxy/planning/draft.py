"""Instances for all legs of one path, each chosen by what is foreseen of the others. Charges them; knows no breakers.

    encoders    the largest item first; near to who prefills, where bytes travel at different rates
    prefill     by when all embeddings are there, and by what it holds of the prompt
    decode      with room for prompt and output; near to prefill

An engine that has the beginning of the prompt in its KV, with an image in it, is chosen before any encoder, and such an
image goes to none: but only where engines can encode, since what they hold is believed and not known. The engine gets
the media, which it skips where they are in its KV, and encodes where they are not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.ledger import Lease
from proxy.balancer.policy import NOTHING, Demand
from proxy.balancer.pool import Pool
from proxy.balancer.prefix import Chain, Prefixes
from proxy.core import Item, Job, Path, Role, State
from proxy.planning.families import Families
from proxy.planning.joint import Joint, Pools
from proxy.planning.links import Place
from proxy.planning.prospects import Prospects, Sight, unique
from proxy.routing import paths, router

Taken = Sequence[tuple[Item, Lease]]
"""Items with what they are charged as; the lease knows where."""

_RUNNING = (State.READY, State.DRAINING)
_WORTH = 32  # tokens: what comes before the text of a chat is the same in all, and everybody holds it


class Holds(Protocol):
    """What owns leases."""

    def add(self, held: Lease) -> Lease:
        """The same."""


@dataclass(frozen=True, slots=True)
class Draft:
    path: Path  # another than was asked for, where no item needs an encoder
    reason: str  # empty: nothing to say
    encodes: Taken
    reader: Lease  # who prefills
    decoder: Lease | None
    seconds: float  # to the first token


class _Known(NamedTuple):
    """What is believed of a prompt in KV."""

    chain: Chain | None = None
    left: Mapping[str, int] = NOTHING  # of the reader's work, by URL
    spares: Mapping[str, Collection[int]] = NOTHING  # items that need no encoder, by URL


UNKNOWN = _Known()


class Drafts:
    def __init__(
        self, fleet: Fleet, balancer: Balancer, prospects: Prospects, sight: Sight, families: Families
    ) -> None:
        self._fleet = fleet
        self._balancer = balancer
        self._prospects = prospects
        self._sight = sight
        self._families = families
        self._joint = Joint(balancer, sight.links)
        self._prefixes = Prefixes()
        self._version = fleet.version  # that the prefixes are of

    def draw(self, path: Path, job: Job, pools: Pools, family: str, holds: Holds) -> Draft:
        """`pools` are not empty. All leases are added to `holds`."""
        self._forget_others()
        demand = self._prospects.demand(path, pools.role, job)
        known = self._known(path, job, pools, family, demand.work)
        demand = demand._replace(held=known.left)
        items, reason, reader, place = unique(job.items) if path.encodes else [], "", None, None
        if known.spares:
            reader = holds.add(self._balancer.take(pools.role, pools.readers, demand))
            needed = _needed(job, items, known.spares.get(reader.instance.url, ()))
            if len(needed) < len(items):
                reason = f"{router.what(len(items))}, {len(items) - len(needed)} of which in the engine's KV already"
            items, path = needed, path if needed else paths.inline(path)
        kv = job.prompt_tokens * self._sight.kv_bytes if pools.decoders is not None else 0
        if self._joint.differ(pools):
            place = Place.of(reader.instance) if reader else self._joint.place(pools, items, demand, kv)
        encodes = self._encodes(items, pools.encoders, place, holds)
        ready = self._prospects.ready(lease.instance.url for item, lease in encodes if lease.tokens >= item.work)
        if reader is None:
            readers = pools.readers if place is None else self._joint.at(pools.readers, place)
            reader = holds.add(self._balancer.take(pools.role, readers, demand._replace(ready=ready)))
        if known.chain is not None:
            self._prefixes.placed(reader.instance.url, known.chain)
        decoder = self._decoder(path, job, pools.decoders, place, kv, holds)
        seconds = self._prospects.expected(job, pools.role, reader.instance.url, reader.tokens, ready)
        if place is not None:
            seconds += sum(self._joint.seconds(Place.of(to.instance), place, item.nbytes) for item, to in encodes)
            seconds += 0.0 if decoder is None else self._joint.seconds(place, Place.of(decoder.instance), kv)
        return Draft(path, reason, encodes, reader, decoder, seconds)

    def _encodes(self, items: Sequence[Item], encoders: Pool | None, place: Place | None, holds: Holds) -> Taken:
        taken = []
        if encoders is not None:
            for item in items:
                transfer = self._transfer(Role.ENCODE, encoders, place, item.nbytes)
                demand = Demand(item.work, item.identity, transfer=transfer, room=item.tokens)
                taken.append((item, holds.add(self._balancer.take(Role.ENCODE, encoders, demand))))
        return taken

    def _decoder(
        self, path: Path, job: Job, decoders: Pool | None, place: Place | None, kv: int, holds: Holds
    ) -> Lease | None:
        if decoders is None:
            return None
        transfer = self._transfer(Role.DECODE, decoders, place, kv)
        demand = self._prospects.demand(path, Role.DECODE, job)._replace(transfer=transfer)
        return holds.add(self._balancer.take(Role.DECODE, decoders, demand))

    def _transfer(self, role: Role, pool: Pool, place: Place | None, nbytes: int) -> Mapping[str, float]:
        if place is None or role not in self._sight.weighed:
            return NOTHING
        return self._joint.transfer(pool, place, nbytes)

    # ---- prompts in KV

    def _known(self, path: Path, job: Job, pools: Pools, family: str, work: int) -> _Known:
        """`work`: the reader's where it holds nothing."""
        spared = path.encodes and self._sight.media_anyway and family in self._families.inline
        if len(pools.readers) == 1 and not spared:
            return UNKNOWN
        chain = Chain.of(job)
        matched = {url: tokens for url, tokens in self._prefixes.matched(chain, _WORTH).items() if url in pools.readers}
        covered: Mapping[str, Collection[int]] = NOTHING
        if spared or path in paths.INLINE:
            items = {tokens: chain.covered(tokens) for tokens in set(matched.values())}  # not for each URL anew
            covered = {url: items[tokens] for url, tokens in matched.items()}
        left = {url: work - tokens for url, tokens in matched.items()}
        if path in paths.INLINE:
            for url, indices in covered.items():
                spares = (item for item in job.items if item.index in indices)
                left[url] -= self._prospects.inline_work(spares, pools.role)
        left = {url: max(1, tokens) for url, tokens in left.items() if tokens < work}
        return _Known(chain, left, {url: found for url, found in covered.items() if found} if spared else NOTHING)

    def _forget_others(self) -> None:
        """Whoever does not run holds nothing, and comes back as another process."""
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            for url in tuple(self._prefixes.urls):
                instance = self._fleet.get(url)
                if instance is None or instance.state not in _RUNNING:
                    self._prefixes.forget(url)


def _needed(job: Job, items: Sequence[Item], spared: Collection[int]) -> list[Item]:
    """Those of `items` that an encoder must see, since an item like it is not spared."""
    needed = {item.identity for item in job.items if item.index not in spared}
    return [item for item in items if item.identity in needed]
