"""What legs teach once they are over: how fast instances work, who holds which item, how large media and texts are.

A leg that failed, or that nobody waited for to its end, says nothing of speed. Pure, and a few microseconds of the text
path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proxy.balancer.balance import Balancer
from proxy.balancer.pace import SEQUENCE, STEP, TOKEN
from proxy.core import Handle, Job, Leg, Role, model_of
from proxy.media.costs import Costs
from proxy.planning.plan import Held

_SAME = 4  # answers, and counts of prompts, of which one is looked at: those of one time are much alike
_ENOUGH = 4  # tokens of an answer that tell of its pace

Handles = Mapping[int, Handle]


class Lessons:
    """What is taught goes to the balancer's rates and holders, and to the costs of requests to come."""

    def __init__(self, balancer: Balancer, costs: Costs) -> None:
        self._rates = balancer.rates
        self._holders = balancer.holders
        self._ledger = balancer.ledger
        self._costs = costs
        self._answers = 0
        self._counts = 0

    def encoded(self, leg: Leg, handles: Handles, ahead: int, seconds: float) -> None:
        """All items of the leg are encoded. A rate is learnt where none of them was there before."""
        url, holders = leg.instance.url, self._holders
        for item in leg.items:
            holders.told(url, item.identity, True)
            if item.index in handles:
                self._costs.sizes.learn(item, handles[item.index])
        work = sum(max(1, item.work) for item in leg.items)
        told = [handle.entry.get("cached") for handle in handles.values()]
        hit = charged(leg) < work if None in told or not told else any(told)
        if leg.items and not hit:
            self._rates[Role.ENCODE].observe(url, work, ahead, seconds)

    def lost(self, legs: Iterable[Leg]) -> None:
        """These encoders have not got, or have no more, what was sent there."""
        for leg in legs:
            for item in leg.items:
                self._holders.told(leg.instance.url, item.identity, False)

    def prefilled(self, leg: Leg, job: Job, handles: Handles, ahead: int, seconds: float, usage: Any) -> None:
        """`leg` has prefilled `job` within `seconds` from when it could begin. `usage`: of its reply, if it has any."""
        work, cached = charged(leg), _cached(usage)
        if cached and not job.items:
            work = usage["prompt_tokens"] - cached
        self._rates[Role.PREFILL].observe(leg.instance.url, work or 1, ahead, seconds)
        self._count(job, handles, usage)

    def began(self, leg: Leg, job: Job, ahead: int, seconds: float) -> None:
        """An engine that prefills and decodes has said its first token."""
        work = max(1, charged(leg) - job.output_tokens)
        self._rates[leg.role].observe(leg.instance.url, work, ahead, seconds)

    def answered(self, leg: Leg, job: Job, handles: Handles, tokens: float, seconds: float, usage: Any = None) -> None:
        """`leg`, which still holds its load, has said the last of an answer: `tokens` within `seconds`, in which it
        did nothing but decode; 0 where they are not known.

        A rate of decoding is one of reading KV: a step counts as the reading of as many tokens as take its time on the
        engine that `pace` knows, and those of all sequences are among them.
        """
        self._answers += 1
        if self._answers % _SAME != 1:
            return
        if tokens >= _ENOUGH and leg.role is Role.DECODE:
            url = leg.instance.url
            step = (STEP + SEQUENCE * self._ledger.leases(url=url)) / TOKEN
            self._rates[Role.DECODE].observe(url, int(step), self._ledger.load(url), seconds / tokens)
        self._count(job, handles, usage)

    def _count(self, job: Job, handles: Handles, usage: Any) -> None:
        """An engine has counted the prompt of `job`, in which each item has what its encoder told, or was predicted."""
        told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(told) is not int:
            return
        self._counts += 1
        if self._counts % _SAME != 1:
            return
        for item in job.items:
            handle = handles.get(item.index)
            tokens = None if handle is None else handle.entry.get("num_tokens")
            told -= tokens if type(tokens) is int else item.tokens
        self._costs.text.learn(model_of(job.body), job.text_bytes, told)


def ahead(leg: Leg) -> int:
    """Predicted tokens of others at the leg's instance, for when it is sent."""
    held = leg.hold
    return held.leases[0].others + held.leases[0].tokens - charged(leg) if isinstance(held, Held) else 0


def charged(leg: Leg) -> int:
    """Predicted tokens of the leg itself."""
    held = leg.hold
    if not isinstance(held, Held):
        return 0
    leases = held.leases
    return leases[0].tokens if len(leases) == 1 else sum([lease.tokens for lease in leases])


def generated(usage: Any) -> int:
    """Tokens of an answer, as its engine has counted them; 0 where it tells nothing."""
    return _told(usage, "completion_tokens")


def prompted(usage: Any) -> int:
    """Tokens of a prompt, in the same way."""
    return _told(usage, "prompt_tokens")


def _told(usage: Any, name: str) -> int:
    told = usage.get(name) if isinstance(usage, dict) else None
    return told if type(told) is int else 0


def _cached(usage: Any) -> int:
    """Prompt tokens whose KV was there, as engines tell; 0 where nothing sensible is said."""
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    if not isinstance(details, dict):
        return 0
    cached, total = details.get("cached_tokens"), usage.get("prompt_tokens")
    return cached if type(cached) is int and type(total) is int and 0 < cached < total else 0
