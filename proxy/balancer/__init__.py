"""Which instance takes a leg, and what that costs it. Pure: candidates and costs in, a leased instance out."""

from __future__ import annotations

from collections.abc import Callable

from proxy.balancer.least_loaded import LeastLoaded
from proxy.balancer.policy import Means, Policy
from proxy.balancer.round_robin import RoundRobin

POLICIES: dict[str, Callable[[Means], Policy]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
}
"""By the name that `--policy` takes; each role gets an object of its own."""
