from proxy.discovery.base import joined


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert joined("10.0.0.1", 80) == "10.0.0.1:80"
    assert joined("fd00::1", 80) == "[fd00::1]:80"
