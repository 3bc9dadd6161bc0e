"""The one composition root: settings in, a running proxy out. No logic of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from proxy import api, callbacks
from proxy.admin import Admin
from proxy.admission import Admission, Limits
from proxy.balancer import POLICIES
from proxy.balancer.balance import Balancer
from proxy.balancer.fleet import Fleet
from proxy.breaker import Breakers, Thresholds
from proxy.callbacks import Metaserver
from proxy.dialects import DIALECTS
from proxy.dispatch import Dispatcher, Rules
from proxy.encoding import Encoding
from proxy.gate import Gate
from proxy.health import Health, Probing
from proxy.hedge import Hedge
from proxy.http.router import Router, post
from proxy.http.server import Limits as HttpLimits
from proxy.http.server import Server
from proxy.legs import Legs, Suspicion
from proxy.metrics import Metrics
from proxy.openai import Identity
from proxy.plan import Planner
from proxy.settings import ProxySettings
from proxy.tasks import together
from proxy.upstream import Timeouts, Upstream

log = logging.getLogger(__name__)


class Proxy:
    """Every part of one proxy, wired. `serving()` runs it."""

    def __init__(self, settings: ProxySettings) -> None:
        self.settings = settings
        self.fleet = Fleet()
        for role, endpoint in settings.fleet():
            self.fleet.join(endpoint.url, role, endpoint.dialect)
        self.balancer = Balancer({role: POLICIES[name]() for role, name in settings.policies().items()})
        self.metrics = Metrics()
        self.upstream = Upstream(_timeouts(settings))
        self.metaserver = Metaserver(settings.host, settings.metaserver_url)
        self.breakers = Breakers(Thresholds(settings.breaker_failures, settings.breaker_delay))
        probing = Probing(settings.probe_interval, settings.probe_timeout, settings.probe_failures)
        self.health = Health(self.fleet, self.balancer, self.breakers, self.upstream, probing)
        self.gate = Gate(Admission(_limits(settings)))
        self.dispatcher = self._dispatcher(settings)
        self.port = settings.port

    def _dispatcher(self, settings: ProxySettings) -> Dispatcher:
        dialects = {name: dialect(settings.order) for name, dialect in DIALECTS.items()}
        suspicion = Suspicion(dead=self.health.dead, opened=self.health.suspect)
        legs = Legs(dialects, self.upstream, self.metrics, time.monotonic, suspicion)
        planner = Planner(self.fleet, self.balancer, self.breakers, settings.inline_encoding)
        encoding = Encoding(legs, planner, Hedge(settings.hedge_after), settings.max_attempts)
        rules = Rules(settings.max_attempts, settings.resume, settings.request_timeout)
        return Dispatcher(planner, legs, encoding, self.metaserver, self.gate, rules)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = self.settings.host
        host = "127.0.0.1" if host in ("", "0.0.0.0") else "::1" if host == "::" else host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def server(self) -> Server:
        settings = self.settings
        openai = api.OpenAI(self.fleet, self.balancer, self.dispatcher, self.upstream, self.metrics, self._identity)
        admin = Admin(self.fleet, self.balancer, self.health, settings.admin_key, settings.dialect)
        routes = [*openai.routes(), *admin.routes(), post(callbacks.ROUTE, self.metaserver.handle)]
        return Server(api.edge(Router(routes)), api.refused, HttpLimits(body_bytes=settings.max_body_bytes))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Proxy]:
        """Listens within; leaving waits for requests in flight, for the grace time, and then cancels them."""
        async with self.upstream, together() as group:
            server = self.server()
            try:
                self.port = self.metaserver.port = await server.start(self.settings.host or None, self.settings.port)
                probes = group.create_task(self.health.run())  # a crash of it ends the proxy, loudly
                yield self
                probes.cancel()
            finally:
                self.gate.close()
                await server.stop(self.settings.grace_timeout)

    def _identity(self, headers: Mapping[str, str]) -> Identity:
        settings = self.settings
        if not settings.tenant_salt:
            return Identity(trust_client=settings.trust_client_identity)
        tenant = headers.get(settings.tenant_header, "")
        return Identity(f"{settings.tenant_salt}\0{tenant}".encode(), settings.trust_client_identity)


def _timeouts(settings: ProxySettings) -> Timeouts:
    return Timeouts(
        connect=settings.connect_timeout,
        encode=settings.encode_timeout,
        prefill=settings.prefill_timeout,
        first_token=settings.first_token_timeout,
        stream_idle=settings.stream_idle_timeout,
        answer=settings.answer_timeout,
    )


def _limits(settings: ProxySettings) -> Limits:
    return Limits(
        requests=settings.max_concurrent,
        nbytes=settings.max_bytes_in_flight,
        queue=settings.max_queue,
        patience=settings.queue_timeout,
    )


async def run(settings: ProxySettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError if the address cannot be had."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    proxy = Proxy(settings)
    async with proxy.serving():
        for instance in proxy.fleet:
            log.info("%s %s (%s)", instance.role.label, instance.url, instance.dialect)
        print(f"READY {proxy.url}", flush=True, file=sys.stdout)
        await stop.wait()
        log.info("stopping; requests in flight have %.0f s", settings.grace_timeout)
