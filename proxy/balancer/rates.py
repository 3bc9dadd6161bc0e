"""How fast each instance of one role works, learnt from the times that its legs took. Pure: times are passed in.

What a leg took, divided by its own work and what was ahead of it, is one sample. The rate is the median of the last
few: a leg that took a hundred times as long moves it by one rank, and eight of another speed make that the rate.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from typing import Any

_WINDOW = 15  # samples
_DOUBT = 2  # samples of the typical rate that a new instance begins with: its first leg may be like no other
_NEWS = 0.01  # a smaller change of a rate is none
_LOOK = 4  # legs between two looks at a full window: a look costs what ten legs do
_PATIENCE = 64  # legs of each of the others in which an instance without any becomes one that nobody knows


class _Seen:
    """The samples of one instance."""

    __slots__ = ("count", "last", "rate", "samples")

    def __init__(self, typical: float) -> None:
        self.samples = deque([typical] * _DOUBT, maxlen=_WINDOW)
        self.rate = typical
        self.count = 0  # legs
        self.last = 0  # how many had been observed of all instances when it was last looked at


class Rates:
    """Seconds per token of work. One for each role, in each worker: a worker learns from its own requests.

    An instance that gets no work could never show that it has become faster: after a while it counts as unknown.
    """

    def __init__(self, prior: float) -> None:
        """`prior`: seconds per token of an instance while nothing of its role has been observed."""
        self._prior = prior
        self._seen: OrderedDict[str, _Seen] = OrderedDict()  # longest unobserved first
        self._observed = 0  # legs
        self._sorted: list[float] = []  # all rates
        self.version = 0  # another number when a rate has changed by more than a hundredth

    def __repr__(self) -> str:
        rates = {url: seen.rate for url, seen in self._seen.items()}
        return f"<Rates {rates}>"

    def seconds(self, url: str) -> float:
        """Per token of work; greater than 0. What is typical, of an instance that nothing is known of."""
        seen = self._seen.get(url)
        return self.typical if seen is None else seen.rate

    @property
    def typical(self) -> float:
        """The median of all rates."""
        rates = self._sorted
        return rates[len(rates) // 2] if rates else self._prior

    def observe(self, url: str, work: int, ahead: int, seconds: float) -> None:
        """A leg of `work` tokens (> 0) took `seconds`, with `ahead` tokens before it when it was sent.

        A leg that failed, or whose end nobody waited for, says nothing of the rate.
        """
        if seconds <= 0:
            return  # a clock that stands still
        seen = self._seen.get(url)
        if seen is None:
            seen = self._seen[url] = _Seen(self.typical)
            insort(self._sorted, seen.rate)
            self.version += 1
        self._observed += 1
        seen.count += 1
        seen.samples.append(seconds / (work + ahead))
        if seen.count <= _WINDOW or not seen.count % _LOOK:
            self._look(url, seen)

    def _look(self, url: str, seen: _Seen) -> None:
        self._seen.move_to_end(url)
        seen.last = self._observed
        rate = sorted(seen.samples)[len(seen.samples) // 2]
        if abs(rate - seen.rate) > _NEWS * seen.rate:
            self._unlist(seen.rate)
            insort(self._sorted, rate)
            seen.rate = rate
            self.version += 1
        longest = next(iter(self._seen.values()))
        if self._observed - longest.last > _PATIENCE * len(self._seen):
            self.forget(next(iter(self._seen)))

    def forget(self, url: str) -> None:
        """`url` has left the fleet. Unknown ones are ignored."""
        seen = self._seen.pop(url, None)
        if seen is not None:
            self._unlist(seen.rate)
            self.version += 1

    def shown(self, url: str) -> dict[str, Any]:
        """For people, as JSON."""
        seen = self._seen.get(url)
        return {"seconds_per_token": self.seconds(url), "observations": 0 if seen is None else seen.count}

    def _unlist(self, rate: float) -> None:
        del self._sorted[bisect_left(self._sorted, rate)]
