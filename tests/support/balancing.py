"""Balancers and pools as tests want them: few words, no fleet."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from proxy.balancer import POLICIES
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.board import Board
from proxy.balancer.policy import Means
from proxy.balancer.pool import Pool
from proxy.balancer.rates import Rates
from proxy.core import BOTH, ROLES, Instance, Role


def balancer(policy: str = "least_loaded", board: Board | None = None, seed: int = 0) -> Balancer:
    """One with the same policy for every role, and dice that fall the same each time."""
    rates = {role: Rates(prior) for role, prior in PRIORS.items()}
    policies = {role: POLICIES[policy](Means(role, rates[role], Random(seed).random)) for role in ROLES}
    return Balancer(policies, board, rates)


def pool(urls: Iterable[object], role: Role = BOTH) -> Pool:
    """READY or not, they are candidates."""
    return Pool(Instance(str(url), role, "native") for url in urls)
