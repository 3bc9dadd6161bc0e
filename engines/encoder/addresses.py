"""Which IP addresses are of the open Internet. Pure; the proxy has its own of these, and a test compares them.

Not of it: IANA's special-purpose registries (RFC 6890 and its updates), what carries such an IPv4 address inside (RFC
4291, 6052), and where clouds answer their own machines.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_PRIVATE_4 = tuple(
    IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's own services, seen from its machines
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")
_PRIVATE_6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_CARRIERS = tuple(map(IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))  # of an IPv4 address in the last 32 bits


def is_public(address: str) -> bool:
    """Raises ValueError if it is no IP address."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and any(ip in network for network in _CARRIERS):
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _PRIVATE_4)
    return ip in _PUBLIC_6 and not any(ip in network for network in _PRIVATE_6)
