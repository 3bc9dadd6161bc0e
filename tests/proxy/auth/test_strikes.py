"""How long who guesses keys has to wait, and who that is."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from proxy.auth.strikes import Strikes, address

LOCAL = (ip_network("10.0.0.0/8"), ip_network("::1/128"))


def test_a_few_mistakes_are_free_and_then_each_costs_more() -> None:
    strikes = Strikes()
    assert not strikes
    waits, now = [], 0.0
    for _ in range(18):
        strikes.wrong("a", now)
        waits.append(strikes.wait("a", now))
        now += waits[-1]
    assert waits == [0.0] * 8 + [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert strikes and strikes.wait("b", now) == 0.0
    assert strikes.wait("a", now - 0.5) == pytest.approx(0.5)


def test_who_was_quiet_begins_anew() -> None:
    strikes = Strikes()
    for _ in range(9):
        strikes.wrong("a", 0.0)
    assert strikes.wait("a", 0.0) == 1.0
    strikes.wrong("a", 601.0)
    assert strikes.wait("a", 601.0) == 0.0


def test_memory_is_bounded_whoever_guesses() -> None:
    strikes = Strikes()
    for n in range(10_000):
        strikes.wrong(str(n), float(n) / 1000)
    assert repr(strikes) == "<Strikes of 4096 addresses>"


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.1", "192.0.2.1"),  # who is no proxy of ours is not believed
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.1, 10.9.9.9", "198.51.100.1"),  # what stands before it, anybody may say
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "198.51.100.1, nonsense", "10.0.0.1"),
        ("::1", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff", "", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "", "fe80::/64"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("", "", ""),
    ],
)
def test_whom_a_request_comes_from(peer: str, forwarded: str, found: str) -> None:
    assert address(peer, forwarded, LOCAL) == found
