"""Which instance takes a leg, and what that costs it. Pure: candidates and costs in, a leased instance out."""

from __future__ import annotations

from collections.abc import Callable

from proxy.balancer.affinity import Affinity
from proxy.balancer.consistent_hash import ConsistentHash
from proxy.balancer.least_loaded import LeastLoaded
from proxy.balancer.pace import Pace
from proxy.balancer.policy import Means, Policy
from proxy.balancer.random_choice import RandomChoice
from proxy.balancer.round_robin import RoundRobin
from proxy.balancer.two_choices import TwoChoices
from proxy.core import Role


def _predicted(means: Means) -> Policy:
    return Pace(means) if means.role is Role.DECODE else Affinity(means)


POLICIES: dict[str, Callable[[Means], Policy]] = {
    "affinity": _predicted,
    "consistent_hash": ConsistentHash,
    "least_loaded": LeastLoaded,
    "random": RandomChoice,
    "round_robin": RoundRobin,
    "two_choices": TwoChoices,
}
"""By the name that `--policy` takes; each role gets an object of its own."""
