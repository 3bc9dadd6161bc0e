"""What a request may expect before anything is sent: which path brings its first token soonest, and when. Pure.

Nothing is charged here. Times are sums of what is pending at the instances, its own work, and what has to be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import ceil

from proxy.balancer.balance import Balancer
from proxy.balancer.policy import Demand
from proxy.balancer.pool import Pool
from proxy.core import Item, Job, Path, Role
from proxy.planning.links import HOP, Links
from proxy.routing import paths, router
from proxy.routing.decider import Decider, Forecast, kind


@dataclass(frozen=True, slots=True)
class Sight:
    """What flags say of predictions."""

    weighed: Collection[Role] = ()  # roles whose policy weighs when a leg could begin, what is held, and transfer
    always: bool = False  # predict first tokens of requests, too, whose instances depend on no prediction
    media_anyway: bool = True  # engines that can encode take media though encoders are listed
    max_embedding_bytes: int | None = None  # on their way to one instance; one request alone may have more
    links: Links = field(default_factory=Links)
    kv_bytes: int = 98_304  # per token, from prefill to decode: Qwen3-VL-30B


NEAR = Links()
PLAIN = Sight()
"""Every leg is chosen for itself."""


class Prospects:
    def __init__(self, balancer: Balancer, links: Links = NEAR) -> None:
        self._balancer = balancer
        self._links = links
        self._decider = Decider()

    def decided(self, route: router.Route, job: Job, family: str, pool: Callable[[Role], Pool]) -> tuple[Path, str]:
        """One of the route's paths, and why; the first while nothing is known of how fast its engines are."""
        forecasts = self._forecasts(route, job, pool)
        if len(forecasts) == 1:
            return route.path, route.reason
        path, times = self._decider.decide(f"{family} {kind(job)}", forecasts)
        return path, f"{router.what(len(job.items))}, {times}"

    def soonest(self, route: router.Route, job: Job, pool: Callable[[Role], Pool]) -> float:
        """Seconds until the first token, on the best of the paths that `decided` may choose."""
        return min(forecast.seconds for forecast in self._forecasts(route, job, pool))

    def _forecasts(self, route: router.Route, job: Job, pool: Callable[[Role], Pool]) -> list[Forecast]:
        """Of the paths that there is a choice of."""
        known = all(self._balancer.rates[role].version for role in route.path.roles[: 1 + route.path.encodes])
        choice = (route.path, *route.others) if known else (route.path,)
        return [Forecast(path, self.first_token(path, job, pool)) for path in choice]

    def first_token(self, path: Path, job: Job, pool: Callable[[Role], Pool]) -> float:
        """Seconds until the first token, at the best instances of each leg's pool (not empty)."""
        role = path.generation[0]
        ready = self._spread(unique(job.items), pool(Role.ENCODE)) if path.encodes else 0.0
        work = job.prompt_tokens + (self.inline_work(job.items, role) if path in paths.INLINE else 0)
        return self._balancer.foresee(role, pool(role), Demand(max(1, work), ready=ready))

    def demand(self, path: Path, role: Role, job: Job) -> Demand:
        """What the leg of `role` on `path` asks for, looked at alone: decoding keeps the prompt and what it adds."""
        work = job.prompt_tokens
        if path in paths.INLINE and Role.PREFILL in role:
            work += self.inline_work(job.items, role)
        if role is Role.PREFILL:
            return Demand(max(1, work))
        work += job.output_tokens
        return Demand(max(1, work), room=work)

    def ready(self, encoders: Iterable[str]) -> float:
        """Seconds until the embeddings of the last of these, which are charged, are where they are read."""
        load, rates = self._balancer.ledger.load, self._balancer.rates[Role.ENCODE]
        return max((HOP + load(url) * rates.seconds(url) for url in encoders), default=0.0)

    def expected(self, job: Job, role: Role, url: str, work: int, ready: float) -> float:
        """Seconds to the first token of what is charged as `work` to `url`, where all embeddings are there after
        `ready` seconds."""
        rate = self._balancer.rates[role].seconds(url)
        pending = max(0, self._balancer.ledger.load(url) - work)
        if Role.DECODE in role:
            work = max(1, work - job.output_tokens)
        return max(ready, pending * rate) + work * rate

    def inline_work(self, items: Iterable[Item], role: Role) -> int:
        """What encoding `items` costs an engine of `role`, in its own tokens: the time that an encoder would take.

        Meanwhile the engine does nothing else, which whoever waits for it is to see in its load.
        """
        work = sum(item.work for item in unique(items))
        return ceil(work * self._balancer.rates[Role.ENCODE].typical / self._balancer.rates[role].typical)

    def _spread(self, items: Collection[Item], encoders: Pool) -> float:
        """Seconds until all embeddings are there: no sooner than the largest, and than an even share of all."""
        missing = [item.work for item in items if not self._balancer.holders.holders(item.identity)]
        encoded = 0.0
        if missing:
            share = max(*missing, ceil(sum(missing) / len(encoders)))
            encoded = self._balancer.foresee(Role.ENCODE, encoders, Demand(share))
        moving = sum(item.nbytes for item in items) / self._links.rack  # encoders are chosen near, where it matters
        return HOP + moving + encoded


def unique(items: Iterable[Item]) -> list[Item]:
    """The first of each, the largest first: in the order in which they choose encoders."""
    first = {item.identity: item for item in reversed(tuple(items))}
    return sorted(first.values(), key=lambda item: (-item.work, item.index))
