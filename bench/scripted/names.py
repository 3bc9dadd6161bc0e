"""A name server that says what it is told to: addresses (A, AAAA) and services (SRV), over UDP and TCP. It caches
nothing and asks nobody else.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

_UDP_LIMIT = 1232
_LENGTH = struct.Struct("!H")


class Names(asyncio.DatagramProtocol):
    """`records`: by name (no dot at its end) and type, in a zone file's words: {("enc.test", "A"): ["127.0.0.1"]}. A
    name without any does not exist."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.failing = False  # whether every question is answered with SERVFAIL
        self.silent = False  # whether none is answered
        self.asked: Counter[str] = Counter()  # by name
        self.address = ""
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # uvloop's is none by inheritance

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._answer(data)
        if answer is not None and self._transport is not None:
            wire = answer.to_wire()
            if len(wire) > _UDP_LIMIT:
                answer.answer.clear()
                answer.flags |= dns.flags.TC
                wire = answer.to_wire()
            self._transport.sendto(wire, addr)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question over TCP."""
        try:
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            answer = self._answer(await reader.readexactly(length))
            if answer is not None:
                wire = answer.to_wire()
                writer.write(_LENGTH.pack(len(wire)) + wire)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the one who asked has left
        finally:
            writer.close()

    def _answer(self, data: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        self.asked[name] += 1
        if self.silent:
            return None
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif not any(known == name for known, _ in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif said := self.records.get((name, kind)):
            answer.answer.append(dns.rrset.from_text(question.name, 0, "IN", kind, *said))
        return answer


@asynccontextmanager
async def naming() -> AsyncIterator[Names]:
    """A name server on a free port of this machine; `address` is 127.0.0.1:port."""
    names = Names()
    server = await asyncio.start_server(names.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    names.address = f"127.0.0.1:{port}"
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: names, ("127.0.0.1", port))
    try:
        yield names
    finally:
        transport.close()
        server.close()
