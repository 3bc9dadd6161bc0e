"""The proxy and the encoders judge addresses by lists of their own: the same ones."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from engines.encoder import addresses as engines
from proxy.media import addresses as proxy

EDGES = [
    *("0.0.0.0", "1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.169.0.0"),
    *("198.17.255.255", "198.20.0.0", "223.255.255.255", "168.63.129.15", "168.63.129.16", "1fff:ffff::", "2000::"),
    *("2001:200::", "2001:db7::", "2001:db9::", "2003::", "3ffe::", "3fff:1000::", "4000::", "64:ff9b::a00:1"),
]


@given(st.one_of(st.sampled_from(EDGES), st.ip_addresses().map(str)))
def test_an_address_is_public_to_both_or_to_none(address: str) -> None:
    assert proxy.is_public(address) is engines.is_public(address)


@given(st.ip_addresses(v=4), st.sampled_from([0xFFFF << 32, 0x64FF9B << 96]))
def test_an_address_that_carries_another_is_as_public_as_that(inner: IPv4Address, carrier: int) -> None:
    outer = str(IPv6Address(carrier | int(inner)))
    assert proxy.is_public(outer) is engines.is_public(outer) is proxy.is_public(str(inner))


@given(st.ip_addresses())
def test_nothing_is_public_that_python_calls_private(address: IPv4Address | IPv6Address) -> None:
    if not address.is_global or address.is_multicast:
        inner = getattr(address, "ipv4_mapped", None)
        assert not proxy.is_public(str(address)) or inner is not None
