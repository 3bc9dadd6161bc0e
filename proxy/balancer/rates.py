"""How fast each instance of one role works, learnt from the times that its legs took. Pure: times are passed in."""

from __future__ import annotations

from typing import Any


class Rates:
    """Seconds per token of work. One for each role, in each worker: a worker learns from its own requests."""

    def __init__(self, prior: float) -> None:
        """`prior`: seconds per token of an instance while nothing of its role has been observed."""
        self._prior = prior
        self.version = 0  # another number when a rate has changed by more than a hundredth

    def seconds(self, url: str) -> float:
        """Per token of work; greater than 0."""
        return self._prior

    def observe(self, url: str, work: int, ahead: int, seconds: float) -> None:
        """A leg of `work` tokens took `seconds`, with `ahead` tokens before it when it was sent."""

    def forget(self, url: str) -> None:
        """`url` has left the fleet. Unknown ones are ignored."""

    def shown(self, url: str) -> dict[str, Any]:
        """For people, as JSON."""
        return {"seconds_per_token": self.seconds(url)}
