"""Names, asked over real sockets, become the addresses that were judged."""

from __future__ import annotations

import pytest

from proxy.errors import ForbiddenMedia
from proxy.media.addresses import Rules, networks
from proxy.media.resolving import Resolver
from tests.support.names import named


async def test_a_public_name() -> None:
    async with named(cdn_test=lambda _: ["93.184.216.34"]) as names:
        assert await Resolver(Rules(), names.lookup)("cdn.test", 80) == "93.184.216.34"


@pytest.mark.parametrize("found", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], []])
async def test_one_private_address_is_enough_to_refuse(found: list[str]) -> None:
    async with named(mixed_test=lambda _: found) as names:
        with pytest.raises(ForbiddenMedia):
            await Resolver(Rules(networks=networks("192.168.0.0/16")), names.lookup)("mixed.test", 80)


async def test_a_network_may_be_opened() -> None:
    async with named(store_test=lambda _: ["10.1.2.3"]) as names:
        assert await Resolver(Rules(networks=networks("10.0.0.0/8")), names.lookup)("store.test", 80) == "10.1.2.3"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "::1", "::ffff:127.0.0.1"])
async def test_the_systems_own_resolver_is_asked_where_no_other_is_given(host: str) -> None:
    strict, open_ = Resolver(Rules()), Resolver(Rules(networks=networks("0.0.0.0/0,::/0")))
    with pytest.raises(ForbiddenMedia):
        await strict(host, 80)
    assert await open_(host, 80) in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    with pytest.raises(OSError, match=r"not known|No address|failure"):
        await open_("nobody.invalid", 80)
    for resolver in (strict, open_):
        resolver.close()
