"""Addresses of the open Internet, and those that only look so."""

from __future__ import annotations

import pytest

from engines.encoder.addresses import is_public


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_of_the_open_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "0.0.0.0", "10.0.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "192.0.0.192"),
        *("168.63.129.16", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1"),
        *("::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "fec0::1"),
    ],
)
def test_of_ones_own_network(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["", "example.com", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="IPv4 or IPv6"):
        is_public(address)
