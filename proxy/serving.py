"""The proxy's ports and what runs beside them: from the first probe to the last request's end. Wires nothing.

probing ─▶ admins', metaserver's, encoders' ports ─▶ clients' port ─▶ … ─▶ drained ─▶ closed, the others after it
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from proxy import api, callbacks, derived
from proxy.core import UNASKED, Order, Role
from proxy.discovery import finder
from proxy.discovery.watching import Discovery
from proxy.http.router import Audience, Route, Router, post
from proxy.http.server import Server
from proxy.routing import router
from proxy.sglang.enrolment import Enrolment
from proxy.tasks import together
from proxy.telemetry import lag
from proxy.tls import Listener
from proxy.workers.siblings import Kind

if TYPE_CHECKING:
    from proxy.app import Proxy

log = logging.getLogger(__name__)

_LOOK_S = 0.02


class Serving:
    """One life of `proxy`, whose ports are known within."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def _server(self, routes: Iterable[Route], audience: Audience = Audience.ALL) -> Server:
        return Server(api.edge(Router(routes, audience)), api.refused, derived.http_limits(self._proxy.settings))

    @asynccontextmanager
    async def running(self, patience: float) -> AsyncIterator[None]:
        """Listens within, as soon as engines can serve or after `patience` seconds; leaving lets requests in flight
        end, as the settings say, and tells the others why not."""
        proxy = self._proxy
        tracing = nullcontext() if proxy.tracing is None else proxy.tracing.running()
        routes = proxy.routes()
        async with (
            proxy.upstream,
            proxy.metaserver.running(),
            self._siblings(),
            proxy.reading.running(),
            tracing,
            self._encoding(),
            self._administering(routes),
            self._called_back(),
            together() as group,
        ):
            beside = self._probing(), lag.watch(proxy.metrics.lag)  # a crash of these ends the proxy, loudly
            tasks = [group.create_task(work) for work in beside]
            await self._awaited(patience)
            server = proxy.clients = self._server(
                routes, Audience.ALL if proxy.admin_port is None else Audience.CLIENTS
            )
            proxy.port = await self._listen(server, proxy.settings.host, proxy.port, proxy.certificates.clients)
            proxy.metaserver.port = proxy.metaserver.port or proxy.port
            try:
                yield
            finally:
                await self._leave(server)
                for task in tasks:
                    task.cancel()

    async def _awaited(self, patience: float) -> None:
        """Who is asked too early answers 503, and a front that has just found this proxy again would pass that on."""
        proxy = self._proxy
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not router.servable(proxy.fleet.census()):
                    listed = list(proxy.fleet)
                    if (listed or not proxy.membership.finders) and all(i.reason != UNASKED for i in listed):
                        return
                    await asyncio.sleep(_LOOK_S)

    async def _leave(self, server: Server) -> None:
        """New requests are served for the drain delay, while /ready says that there should be none; then nobody
        listens, and those in flight have the grace time."""
        proxy = self._proxy
        delay, grace = proxy.settings.drain_delay, proxy.settings.grace_timeout
        log.info("stopping: new requests are served for %.0f s yet, those in flight for %.0f s more", delay, grace)
        proxy.openai.leaving = True
        server.drain()
        await asyncio.sleep(delay)
        await server.stop(await self._last_callbacks(grace))
        proxy.endings.flush()
        proxy.access.flush()

    @asynccontextmanager
    async def _called_back(self) -> AsyncIterator[None]:
        """Within, decode engines find the metaserver at its own port, if it has one: longer than clients find the
        proxy."""
        proxy, settings = self._proxy, self._proxy.settings
        if settings.metaserver_port is None:
            yield
            return
        server = self._server([post(callbacks.ROUTE, proxy.metaserver.handle)])
        proxy.metaserver.port = await self._listen(server, settings.host, settings.metaserver_port, None)
        try:
            yield
        finally:
            await server.stop(0.0)

    async def _listen(self, server: Server, host: str, port: int, tls: Listener | None) -> int:
        context = None if tls is None else tls.context
        return await server.start(host or None, port, reuse_port=self._proxy.seat is not None, tls=context)

    @asynccontextmanager
    async def _administering(self, routes: Iterable[Route]) -> AsyncIterator[None]:
        """Within, admins have a port of their own, if they are to: for longer than clients have theirs."""
        proxy = self._proxy
        if proxy.admin_port is None:
            yield
            return
        server, host = self._server(routes, Audience.ADMINS), proxy.settings.admin_host or proxy.settings.host
        proxy.admin_port = await self._listen(server, host, proxy.admin_port, proxy.certificates.admins)
        log.info("admins are served at %s", proxy.admin_url)
        try:
            yield
        finally:
            await server.stop(0.0)

    def _siblings(self) -> AbstractAsyncContextManager[None]:
        """Within, the other workers get this one's answers."""
        proxy = self._proxy
        answers = {
            Kind.CALLBACK: proxy.metaserver.answer,
            Kind.RECEIPTS: proxy.receipts.answer,
            Kind.CIRCUITS: proxy.standing.answer,
        }
        return nullcontext() if proxy.seat is None else proxy.seat.siblings.listening(answers)

    @asynccontextmanager
    async def _encoding(self) -> AsyncIterator[None]:
        """Within, language servers find the virtual encoder, if there is one: longer than clients find the proxy."""
        proxy, settings = self._proxy, self._proxy.settings
        if proxy.virtual is None:
            yield
            return
        server = self._server(proxy.virtual.routes())
        proxy.virtual_port = await server.start(settings.host or None, settings.virtual_encoder_port or 0)
        lists = settings.lists()
        try:
            enrolment = Enrolment(lists, settings.virtual_encoder_url, proxy.certificates.trust)
            async with proxy.virtual.wards.running(), enrolment.kept(settings.host, proxy.virtual_port):
                yield
        finally:
            await server.stop(0.0)

    async def _last_callbacks(self, grace: float) -> float:
        """Where decode engines call back at the clients' port (push), that stays open while requests are served, up to
        `grace` seconds; new requests get 503 meanwhile. Returns what is left of it."""
        proxy = self._proxy
        if proxy.settings.metaserver_port is not None:
            return grace
        known = [i for i in proxy.fleet if i.role is Role.PREFILL and i.dialect != "auto"]
        if not any(proxy.speakers(instance).order is Order.DECODE_FIRST for instance in known):
            return grace
        proxy.gate.close()
        began = time.monotonic()
        admission = proxy.gate.admission
        while (admission.requests or admission.waiting) and (left := began + grace - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, _LOOK_S))
        return max(0.0, began + grace - time.monotonic())

    async def _probing(self) -> None:
        proxy = self._proxy
        discovery = Discovery(proxy.membership, lambda word: finder(word, proxy.settings), proxy.health.wake)
        if proxy.seat is not None:
            await proxy.seat.probe(proxy.health, discovery, proxy.rebalancing)
            return
        async with together() as group:
            group.create_task(proxy.health.run())
            group.create_task(discovery.run())
            group.create_task(proxy.rebalancing.run())
