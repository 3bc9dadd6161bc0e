"""Balancers and pools as tests want them: few words, no fleet."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from hypothesis import strategies as st

from proxy.balancer import POLICIES
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.board import Board
from proxy.balancer.policy import Demand, Means
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, ROLES, Instance, Role


def balancer(policy: str = "least_loaded", board: Board | None = None, seed: int = 0) -> Balancer:
    """One with the same policy for every role, and dice that fall the same each time."""
    rates = {role: Rates(prior) for role, prior in PRIORS.items()}
    policies = {role: POLICIES[policy](Means(role, rates[role], Random(seed).random)) for role in ROLES}
    return Balancer(policies, board, rates)


def pool(urls: Iterable[object], role: Role = BOTH, **weights: float) -> Pool:
    """READY or not, they are candidates."""
    return Pool(Instance(str(url), role, "native", weight=weights.get(str(url), 1.0)) for url in urls)


def demands(urls: str) -> st.SearchStrategy[Demand]:
    """Any, with keys that recur, and seconds that add up the same in any order."""
    seconds = st.sampled_from([0.0, 0.25, 0.5, 4.0, 64.0])

    def of(work: int, key: str, held: dict[str, int], *others: Any) -> Demand:
        return Demand(work, key, {url: left for url, left in held.items() if left < work}, *others)

    some = st.sampled_from(urls)
    held, transfer = st.dictionaries(some, st.integers(1, 99)), st.dictionaries(some, seconds)
    return st.builds(
        of,
        st.integers(1, 200),
        st.sampled_from(["", "x", "y", "z"]),
        held,
        seconds,
        transfer,
        st.integers(0, 300),
        st.booleans(),
    )
