"""A name server of the tests' own over UDP, and a resolver that asks it instead of the system's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import dns.asyncquery
import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset


class Names(asyncio.DatagramProtocol):
    """`addresses`: of a name, each time it is asked for; an empty list is a name that does not exist."""

    def __init__(self, addresses: dict[str, Callable[[int], list[str]]]) -> None:
        """The callables get how often their name was asked for before."""
        self._addresses = addresses
        self._transport: asyncio.DatagramTransport | None = None
        self.asked: Counter[str] = Counter()
        self.port = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # asyncio's own is none by inheritance

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        question = query.question[0]
        name = question.name.to_text().rstrip(".")
        found = self._addresses[name](self.asked[name]) if name in self._addresses else []
        if question.rdtype == dns.rdatatype.A and found:
            answer.answer.append(dns.rrset.from_text(question.name, 0, "IN", "A", *found))
            self.asked[name] += 1
        assert self._transport is not None
        self._transport.sendto(answer.to_wire(), addr)

    async def lookup(self, host: str, port: int) -> list[str]:
        """See proxy.resolving.Lookup. Asks each time, and keeps nothing."""
        query = dns.message.make_query(host, "A")
        answer = await dns.asyncquery.udp(query, "127.0.0.1", timeout=5, port=self.port)
        return [record.address for rrset in answer.answer for record in rrset]


@asynccontextmanager
async def named(**addresses: Callable[[int], list[str]]) -> AsyncIterator[Names]:
    """Names with `_` for each dot."""
    names = Names({name.replace("_", "."): found for name, found in addresses.items()})
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: names, ("127.0.0.1", 0))
    names.port = transport.get_extra_info("sockname")[1]
    try:
        yield names
    finally:
        transport.close()
