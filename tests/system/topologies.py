"""Every way to put the stages together: a proxy for each, all in front of the same engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from deploy.processes import Child
from tests.support.cluster import Client, Cluster
from tests.support.waiting import eventually

ROLES = ("encode", "prefill", "decode", "both")
TOPOLOGIES = {
    "both": ("", "disable", "both", "push"),
    "P+D push": ("", "prefill", "decode", "push"),
    "P+D pull": ("", "prefill", "decode", "pull"),
    "E+PD": ("encode", "disable", "both", "push"),
    "E+P+D push": ("encode", "prefill", "decode", "push"),
    "E+P+D pull": ("encode", "prefill", "decode", "pull"),
}
"""Who encodes, prefills and decodes, and the KV handoff."""


@asynccontextmanager
async def fronts(engines: Cluster, topologies: Iterable[str]) -> AsyncIterator[dict[str, Client]]:
    """Start a combined engine beside `engines`, and a proxy for each topology that is ready to serve."""
    both = engines.deployment._engine("both-0", "both")
    engines.deployment.engines["both-0"] = both
    await both.start()
    urls = {role: children[0].url for role in ROLES if (children := engines.deployment.role(role))}
    async with AsyncExitStack() as stack:
        proxies = {name: Child(f"proxy {name}", "proxy", _arguments(urls, name)) for name in topologies}
        for proxy in proxies.values():
            stack.push_async_callback(proxy.stop)
        await asyncio.gather(*(proxy.start() for proxy in proxies.values()))
        found = {name: engines.client(proxy) for name, proxy in proxies.items()}
        for client in found.values():
            await ready(client)
        yield found


def _arguments(urls: Mapping[str, str], topology: str) -> list[str]:
    encode, prefill, decode, handoff = TOPOLOGIES[topology]
    arguments = ["--port", "0", "--host", "127.0.0.1", "--kv-handoff", handoff]
    arguments += ["--prefill-servers-urls", urls.get(prefill, prefill), "--decode-servers-urls", urls[decode]]
    return arguments + (["--encode-servers-urls", urls[encode]] if encode else ["--trust-client-identity"])


async def ready(proxy: Client) -> None:
    """Wait until every stage can be served: a proxy's READY line says only that it listens."""

    async def so() -> bool:
        return bool((await proxy.get("/ready"))["ready"])

    await eventually(so, 30)
