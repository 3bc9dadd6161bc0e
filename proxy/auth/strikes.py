"""Addresses that wrong keys came from, and how long each has to wait before its next key is looked at. No clock.

A few mistakes are free; each one after that doubles the wait. Whoever is quiet for some minutes begins anew. A right
key changes nothing: whoever owns one could guess others between two uses of it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_FREE = 8  # wrong keys
_FIRST_S = 1.0
_LONGEST_S = 60.0
_FORGOTTEN_S = 600.0  # after the last one
_MOST = 4096  # addresses; the one that was quiet for longest makes room

Networks = tuple[IPv4Network | IPv6Network, ...]


@dataclass(slots=True)
class _Strikes:
    count: int = 0
    last: float = 0.0
    until: float = 0.0


class Strikes:
    """Bounded, whoever comes from wherever."""

    def __init__(self) -> None:
        self._by: OrderedDict[str, _Strikes] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Strikes of {len(self._by)} addresses>"

    def __bool__(self) -> bool:
        return bool(self._by)

    def wait(self, address: str, now: float) -> float:
        """Seconds until a key from `address` is looked at again; 0: now."""
        found = self._by.get(address)
        return 0.0 if found is None else max(0.0, found.until - now)

    def wrong(self, address: str, now: float) -> None:
        """A wrong key came from `address`."""
        found = self._by.setdefault(address, _Strikes())
        self._by.move_to_end(address)
        found.count = 1 if now - found.last > _FORGOTTEN_S else found.count + 1
        found.last = now
        if found.count > _FREE:
            found.until = now + min(_LONGEST_S, _FIRST_S * 2.0 ** min(found.count - _FREE - 1, 16))
        if len(self._by) > _MOST:
            self._by.popitem(last=False)


@lru_cache(maxsize=4096)
def address(peer: str, forwarded: str, trusted: Networks) -> str:
    """Who a request came from: the last in `forwarded` (X-Forwarded-For) who is no `trusted` proxy, if `peer` is one.

    Of IPv6 the network of 64 bits: that is what one host gets.
    """
    hops = [hop.strip() for hop in forwarded.split(",")] if forwarded else []
    at = _ip(peer)
    while hops and at is not None and any(at in network for network in trusted):
        earlier = _ip(hops.pop())
        if earlier is None:
            break
        at = earlier
    if at is None:
        return peer
    return str(IPv6Network((at, 64), strict=False)) if isinstance(at, IPv6Address) else str(at)


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return found if mapped is None else mapped
