"""Engines by the addresses of a name (A, AAAA), and by service records that have ports (SRV, RFC 2782).

A name that does not exist has nobody behind it: so says a name server that was reached. One that was not, or that
failed, has said nothing. The hosts file of this machine is not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from dns.asyncresolver import Resolver
from dns.exception import DNSException
from dns.nameserver import Do53Nameserver
from dns.resolver import NXDOMAIN, NoAnswer

from proxy.discovery.base import Say, Unreadable, joined
from proxy.settings.endpoint import Endpoint
from proxy.settings.fleet import FleetSettings
from proxy.tasks import end_if_cancelled

_PATIENCE_S = 5.0  # with all name servers, for one question
_PORT = 53


class _Names:
    def __init__(self, settings: FleetSettings) -> None:
        self._server = settings.dns_server
        self._interval = settings.discovery_interval

    async def watch(self, endpoint: Endpoint, say: Say) -> None:
        """See Finder. Asks again after each interval, whatever the records' time to live: a fleet is small."""
        while True:
            say(await self._read(urlsplit(endpoint.url)))
            await asyncio.sleep(self._interval)

    async def _read(self, url: Any) -> Sequence[str]:
        raise NotImplementedError

    async def _addresses(self, name: str) -> list[str]:
        """In their order. Raises Unreadable where either kind is not told: half of an answer would drain the rest."""
        found = await asyncio.gather(self._ask(name, "A"), self._ask(name, "AAAA"))
        return sorted(record.address for records in found for record in records)

    async def _ask(self, name: str, kind: str) -> list[Any]:
        try:
            return [*await self._resolver().resolve(name, kind, search=True, lifetime=_PATIENCE_S)]
        except (NXDOMAIN, NoAnswer):
            return []
        except (DNSException, OSError) as error:
            raise Unreadable(f"{kind} of {name}: {' '.join(str(error).split()) or type(error).__name__}") from None
        finally:
            end_if_cancelled()  # dnspython waits with asyncio.wait_for

    def _resolver(self) -> Resolver:
        """Made anew for each question: resolv.conf changes while machines move."""
        if not self._server:
            return Resolver()
        host, _, port = self._server.rpartition(":") if self._server.count(":") == 1 else (self._server, "", "")
        resolver = Resolver(configure=False)
        resolver.nameservers = [Do53Nameserver(host, int(port or _PORT))]
        return resolver


class Addresses(_Names):
    """dns+http://name:port: every address of the name, with that port."""

    async def _read(self, url: Any) -> Sequence[str]:
        return [joined(address, url.port) for address in await self._addresses(url.hostname)]


class Services(_Names):
    """srv+http://_service._tcp.name: the addresses of every target, with its port; of several priorities the first.

    The records' weights are shares of a total that each operator chooses; here a weight stands in the URL.
    """

    async def _read(self, url: Any) -> Sequence[str]:
        records = await self._ask(url.hostname, "SRV")
        first = min((record.priority for record in records), default=0)
        found: set[str] = set()
        for record in records:
            target = record.target.to_text()
            if record.priority == first and target != ".":
                found.update(joined(host, record.port) for host in await self._hosts(target))
        return sorted(found)

    async def _hosts(self, target: str) -> Sequence[str]:
        try:
            return [str(ip_address(target.rstrip(".")))]
        except ValueError:
            return await self._addresses(target)
