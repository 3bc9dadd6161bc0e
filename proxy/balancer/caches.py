"""Which encoder is believed to hold the embedding of which item, from what was sent there and what encoders reply."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice

from proxy.balancer.policy import NOTHING
from proxy.balancer.pool import Pool

CAPACITY = 1 << 18
"""Tokens that an instance holds unless it tells: 4 GB of Qwen3-VL-30B's embeddings, 16 KB each."""
HIT = 32
"""A held item costs a 32nd: it is looked up and sent, and neither fetched, decoded nor encoded."""
_SHOWN = 16  # holders of one key, the latest, that a choice is told of: more are not needed to find a good one


class Holders:
    """By instance a list of items, the latest used last, that is cut where its tokens exceed what the instance holds.

    An item is held from the moment it is sent: the engine joins equal items that are in flight.
    """

    def __init__(self) -> None:
        self._items: dict[str, OrderedDict[str, int]] = {}  # by URL: tokens by key
        self._tokens: dict[str, int] = {}  # by URL
        self._urls: dict[str, dict[str, None]] = {}  # by key, the latest last
        self._flights: dict[str, list[str]] = {}  # by key: where it is being encoded, once for each demand

    def __repr__(self) -> str:
        return f"<Holders of {len(self._urls)} items, {len(self._flights)} in flight, {self._tokens}>"

    def holders(self, key: str) -> Collection[str]:
        return self._urls.get(key, {}).keys()

    def count(self, url: str) -> int:
        """How many items `url` is believed to hold."""
        return len(self._items.get(url, ()))

    def held(self, key: str, work: int) -> Mapping[str, int]:
        """What is left of `work` by URL, of those that used the item last."""
        urls = self._urls.get(key)
        if urls is None:
            return NOTHING
        return dict.fromkeys(urls if len(urls) <= _SHOWN else islice(reversed(urls), _SHOWN), hit(work))

    def placed(self, url: str, key: str, work: int, capacity: int = CAPACITY) -> bool:
        """The item was sent there; True if it was held before. `work` tokens of `capacity` are its: others may go."""
        items = self._items.get(url)
        if items is None:
            items = self._items[url] = OrderedDict()
        before = items.pop(key, 0)
        tokens = self._tokens.get(url, 0) + work - before
        items[key] = work
        urls = self._urls.setdefault(key, {})
        urls.pop(url, None)
        urls[url] = None
        while tokens > capacity:
            oldest, freed = items.popitem(last=False)
            tokens -= freed
            self._left(url, oldest)
        self._tokens[url] = tokens
        return before > 0

    def told(self, url: str, key: str, held: bool) -> None:
        """The instance, or what became of a call there, says whether it holds the item now."""
        items = self._items.get(url)
        if items is None or key not in items:
            return  # nobody sent it there lately: its size is not known here
        if held:
            items.move_to_end(key)
        else:
            self._tokens[url] -= items.pop(key)
            self._left(url, key)

    def forget(self, url: str) -> None:
        """`url` has left the fleet. Unknown ones are ignored."""
        for key in self._items.pop(url, ()):
            self._left(url, key)
        self._tokens.pop(url, None)

    def _left(self, url: str, key: str) -> None:
        urls = self._urls[key]
        del urls[url]
        if not urls:
            del self._urls[key]

    # ---- items in flight

    def began(self, url: str, key: str) -> Callable[[], None]:
        """The item is being encoded there until what is returned is called, once."""
        self._flights.setdefault(key, []).append(url)
        return partial(self._ended, url, key)

    def _ended(self, url: str, key: str) -> None:
        flights = self._flights[key]
        flights.remove(url)
        if not flights:
            del self._flights[key]

    def flying(self, key: str, pool: Pool) -> str | None:
        """Who of `pool` encodes the item right now."""
        for url in self._flights.get(key, ()):
            if url in pool:
                return url
        return None


def hit(work: int) -> int:
    """What is left of `work` where it is held, in the same tokens."""
    return max(1, work // HIT)
