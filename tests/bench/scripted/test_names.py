"""The scripted name server, as a resolver sees it."""

from __future__ import annotations

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from bench.scripted.names import Names, naming


async def asked(names: Names, name: str, kind: str) -> tuple[str, list[str]]:
    """The answer's code and records; by TCP if it does not fit into a datagram."""
    host, _, port = names.address.partition(":")
    query = dns.message.make_query(name, kind)
    answer, _ = await dns.asyncquery.udp_with_fallback(query, host, timeout=5, port=int(port))
    return dns.rcode.to_text(answer.rcode()), sorted(str(record) for rrset in answer.answer for record in rrset)


async def test_it_says_what_it_is_told_to() -> None:
    async with naming() as names:
        names.records["e.test", "A"] = ["10.0.0.1", "10.0.0.2"]
        names.records["_e._tcp.test", "SRV"] = ["0 5 8001 e.test."]
        assert await asked(names, "e.test", "A") == ("NOERROR", ["10.0.0.1", "10.0.0.2"])
        assert await asked(names, "e.test", "AAAA") == ("NOERROR", [])
        assert await asked(names, "_e._tcp.test", "SRV") == ("NOERROR", ["0 5 8001 e.test."])
        assert await asked(names, "other.test", "A") == ("NXDOMAIN", [])
        names.failing = True
        assert await asked(names, "e.test", "A") == ("SERVFAIL", [])
        assert names.asked["e.test"] == 3


async def test_many_records_come_by_tcp() -> None:
    async with naming() as names:
        names.records["e.test", "A"] = [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(400)]
        assert len((await asked(names, "e.test", "A"))[1]) == 400


async def test_it_can_be_silent() -> None:
    async with naming() as names:
        names.silent = True
        host, _, port = names.address.partition(":")
        with pytest.raises(dns.exception.Timeout):
            await dns.asyncquery.udp(dns.message.make_query("e.test", "A"), host, timeout=0.05, port=int(port))
