"""What the fleet was asked lately, and what one engine of it carries: learnt from each request that ends.

All of it goes into `flow`, so that any worker tells of all of them: also what this worker's rates are, as the engine
time that the work it saw must have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from proxy.advice.capacity import Carried, Offered
from proxy.advice.flow import Flow, Sum
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.pace import SEQUENCE, STEP, TOKEN
from proxy.core import BOTH, Leg, Plan, Role, State
from proxy.dispatch import Run
from proxy.planning.plan import Held

_EVERY_S = 0.05  # to learn from more than these is not worth its time
_LEAST = 0.05  # requests, faded: below this the last one ended several minutes ago
_ENOUGH = 3  # tokens that tell of a pace
_BATCH = 256  # sequences that engines decode at once by default
_KEPT = 4096.0  # tokens of KV of a sequence, until one has been seen
_DOUBT = 64.0  # of how a pace grows with the batch: as if batches one apart had been seen so often

Sums = Sequence[float]


@dataclass(frozen=True, slots=True)
class Pacing:
    """Seconds per token of each of `batch` sequences that one engine decodes at once: alone + crowd · batch."""

    alone: float
    crowd: float

    def of(self, batch: float) -> float:
        return self.alone + self.crowd * batch


class Sizing:
    """One per worker."""

    def __init__(self, fleet: Fleet, balancer: Balancer, flow: Flow, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._balancer = balancer
        self._flow = flow
        self._clock = clock
        self._learnt = -inf

    def finished(self, run: Run) -> None:
        """A request has been served to its end, and what it held is returned."""
        if run.plan is None:
            return
        now = self._clock()
        amounts = [(Sum.REQUESTS, 1.0), (Sum.OUTPUT, _output(run))]
        for leg in run.plan.legs:
            if leg.role is Role.ENCODE:
                amounts += self._encoded(leg)
            elif leg.role is not Role.DECODE:
                amounts.append((Sum.PROMPT, _prompt(run, leg)))
        if now - self._learnt >= _EVERY_S:
            self._learnt = now
            amounts += self._learned(run, run.plan, now)
        self._flow.add(now, amounts)

    # ---- what one request tells

    def _encoded(self, leg: Leg) -> Iterator[tuple[Sum, float]]:
        rate = self._balancer.rates[Role.ENCODE].seconds(leg.instance.url)
        for work in _works(leg):
            yield Sum.ENCODES, 1.0
            yield Sum.ENCODE_WORK, work
            yield Sum.ENCODE_SQUARES, work * work
            yield Sum.ENCODE_TIME, work * rate

    def _learned(self, run: Run, plan: Plan, now: float) -> Iterator[tuple[Sum, float]]:
        """Of how fast engines prefill and decode."""
        reads, leg = plan.leg(BOTH if plan.path.combined else Role.PREFILL), plan.legs[-1]
        prompt = _prompt(run, reads)
        yield Sum.FIRST_PROMPT, prompt
        yield Sum.FIRST_TIME, prompt * self._balancer.rates[reads.role].seconds(reads.instance.url)
        pace = _pace(run, leg.role, now)
        if pace is not None:
            batch = self._balancer.ledger.leases(url=leg.instance.url) + 1
            yield Sum.PACES, 1.0
            yield Sum.BATCH, batch
            yield Sum.BATCH_SQUARES, batch * batch
            yield Sum.PACE, pace
            yield Sum.BATCH_PACE, batch * pace
            yield Sum.KEPT, sum(_works(leg))

    # ---- what they tell together

    def offered(self) -> Offered:
        """All zero where nothing has ended for minutes."""
        now = self._clock()
        sums, span = self._flow.sums(now), self._flow.span(now)
        if sums[Sum.REQUESTS] < _LEAST:
            return Offered(0.0, 0.0, 0.0, 0.0)
        mean = _ratio(sums[Sum.ENCODE_WORK], sums[Sum.ENCODES], 0.0)
        spread = _ratio(sums[Sum.ENCODE_SQUARES], sums[Sum.ENCODES] * mean**2, 2.0) - 1
        requests, encode, prompt, output = (
            sums[what] / span for what in (Sum.REQUESTS, Sum.ENCODE_WORK, Sum.PROMPT, Sum.OUTPUT)
        )
        return Offered(requests, encode, prompt, output, max(0.0, spread))

    def carried(self) -> Carried:
        """With a stage's prior where nothing was seen of it."""
        sums = self._flow.sums(self._clock())
        census = self._fleet.census()
        batch = max(1.0, min(_BATCH, self._room() / _kept(sums)))
        return Carried(
            {role: counted[State.READY] for role, counted in census.items()},
            encode=_ratio(sums[Sum.ENCODE_WORK], sums[Sum.ENCODE_TIME], 1 / PRIORS[Role.ENCODE]),
            prefill=_ratio(sums[Sum.FIRST_PROMPT], sums[Sum.FIRST_TIME], 1 / PRIORS[Role.PREFILL]),
            decode=batch / _pacing(sums).of(batch),
        )

    def pacing(self) -> Pacing:
        return _pacing(self._flow.sums(self._clock()))

    def _room(self) -> float:
        """Tokens of KV of an engine that decodes, on average of those that tell."""
        told = [float(i.facts["kv_tokens"]) for i in self._fleet if Role.DECODE in i.role and "kv_tokens" in i.facts]
        return sum(told) / len(told) if told else inf


def _works(leg: Leg) -> list[int]:
    """What the leg was charged with: one work for each item of an encode leg."""
    return [lease.tokens for lease in leg.hold.leases] if isinstance(leg.hold, Held) else []


def _prompt(run: Run, leg: Leg) -> int:
    """Tokens that the leg had to prefill."""
    work = sum(_works(leg))
    return work if leg.role is Role.PREFILL else max(1, work - run.job.output_tokens)


def _output(run: Run) -> float:
    """Tokens of the answer; as predicted where nobody could tell."""
    return run.tokens + run.job.stream if run.tokens else run.job.output_tokens


def _pace(run: Run, role: Role, now: float) -> float | None:
    """Seconds per token, where they can be told from the prompt's: of a stream, or of a decode engine."""
    if run.tokens < _ENOUGH or run.record.attempts > 1:
        return None
    if run.job.stream:
        return (now - run.record.began - run.record.timings["ttft"]) / run.tokens
    return (now - run.decode_began) / run.tokens if role is Role.DECODE else None


def _pacing(sums: Sums) -> Pacing:
    """The line through what was seen, as steep as engines' steps are known to grow where batches hardly differed."""
    growth = (SEQUENCE + TOKEN * _kept(sums)) / STEP  # for each sequence more, of the time of one alone
    count = sums[Sum.PACES]
    if count < _LEAST:
        return Pacing(STEP, STEP * growth)
    batch, pace = sums[Sum.BATCH] / count, sums[Sum.PACE] / count
    varied = max(0.0, sums[Sum.BATCH_SQUARES] - count * batch**2)
    together = sums[Sum.BATCH_PACE] - count * batch * pace
    usual = pace * growth / (1 + growth * batch)
    crowd = min(max(0.0, (together + _DOUBT * usual) / (varied + _DOUBT)), 0.99 * pace / batch)
    return Pacing(pace - crowd * batch, crowd)


def _kept(sums: Sums) -> float:
    return _ratio(sums[Sum.KEPT], sums[Sum.PACES], _KEPT)


def _ratio(amount: float, count: float, otherwise: float) -> float:
    return amount / count if amount > 0 and count > 0 else otherwise
