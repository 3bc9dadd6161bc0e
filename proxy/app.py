"""The one composition root: settings in, a running proxy out. No logic of its own."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy import api, callbacks, derived
from proxy.admin import Admin
from proxy.advice import flow
from proxy.advice.advising import Advising
from proxy.advice.rebalancing import Rebalancing
from proxy.advice.sizing import Sizing
from proxy.auth import quota
from proxy.auth.guard import Guard
from proxy.balancer.balance import PRIORS, Balancer
from proxy.balancer.fleet import Fleet
from proxy.balancer.rates import Rates
from proxy.breaker import Breakers
from proxy.callbacks import Metaserver
from proxy.core import Instance, State
from proxy.derived import Secrets
from proxy.dialects import FEEDS, INLINE, Speakers
from proxy.dialects.base import Options
from proxy.dispatch import Dispatcher
from proxy.encoding import Encoding
from proxy.health import Health
from proxy.hedge import Hedge
from proxy.http.router import Audience, Route, post
from proxy.http.server import Server
from proxy.intake.admission import Admission
from proxy.intake.gate import Gate
from proxy.intake.outlooks import Outlooks, idle
from proxy.intake.reading import Reading
from proxy.joining import heartbeats
from proxy.joining.introduction import Introduction
from proxy.joining.membership import Membership
from proxy.legs import Legs, Suspicion
from proxy.lessons import Lessons
from proxy.media.costs import Costs
from proxy.media.fetching import Fetching
from proxy.media.inlining import Inlining
from proxy.media.measuring import Measuring
from proxy.media.profiles import Profiles, flagged
from proxy.media.resolving import Resolver
from proxy.planning.families import Families
from proxy.planning.plan import Planner
from proxy.planning.prospects import Sight
from proxy.profiling import Profiling
from proxy.serving import Serving
from proxy.settings import ProxySettings
from proxy.sglang.encoder_calls import EncoderCalls
from proxy.sglang.pictures import Pictures
from proxy.sglang.virtual_encoder import VirtualEncoder
from proxy.switching import Switching
from proxy.telemetry import history
from proxy.telemetry.access import AccessLog
from proxy.telemetry.endings import Endings
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.page import Page
from proxy.telemetry.receipts import Receipts
from proxy.telemetry.snapshot import Owners, Snapshots
from proxy.telemetry.standing import Standing
from proxy.telemetry.tracing import Tracing
from proxy.upstream import Upstream
from proxy.workers.crew import Seat

log = logging.getLogger(__name__)


class Proxy:
    """Every part of one proxy, wired. `serving()` runs it."""

    def __init__(self, settings: ProxySettings, seat: Seat | None = None, secrets: Secrets | None = None) -> None:
        """`seat`: this process's place among several workers, whose supervisor has filled the fleet. `secrets`: of its
        files; None: they are read. Raises ValueError naming the file at fault."""
        secrets = secrets or Secrets.read(settings)
        self.settings = settings
        self.seat = seat
        self.fleet = Fleet() if seat is None else seat.fleet(self._told)
        rates = {role: Rates(prior) for role, prior in PRIORS.items()}
        self.balancer = Balancer(derived.policies(settings, rates), seat.board() if seat else None, rates)
        beats = heartbeats.alone() if seat is None else seat.heartbeats()
        self.membership = Membership(self.fleet, beats, self.balancer.forget)
        (self.membership.configure if seat is None else self.membership.follow)(settings.fleet())
        self.metrics = Metrics(seat.folder if seat else None, settings.metrics == "on")
        self.sizing = Sizing(self.fleet, self.balancer, seat.flow() if seat else flow.alone(), time.monotonic)
        used = seat.quota() if seat else quota.alone()
        self.guard = Guard(secrets.rights, used, time.monotonic)
        self.certificates = secrets.certificates
        self.upstream = Upstream(derived.timeouts(settings), settings.engine_key, self.certificates.trust)
        siblings = seat.siblings if seat else None
        scheme = self.certificates.scheme if settings.metaserver_port is None else "http"
        self.metaserver = Metaserver(settings.host, settings.metaserver_url, siblings, scheme)
        self.breakers = Breakers(derived.thresholds(settings))
        self.speakers = Speakers(Options(settings.order, settings.media_to_prefill))
        self.families = Families(INLINE, FEEDS)
        self.introduction = Introduction(
            *(self.upstream, self.speakers, self.families, derived.patience(settings), settings.forward_authorization)
        )
        self.health = Health(
            *(self.fleet, self.balancer, self.breakers, self.upstream, self.introduction, derived.probing(settings))
        )
        self.switching = Switching(
            *(self.fleet, self.balancer.ledger, self.upstream, self.health.wake, time.monotonic),
            settings.switch_timeout,
        )
        self.rebalancing = Rebalancing(
            *(self.sizing, self.fleet, self.balancer.ledger, self.switching, time.monotonic),
            derived.rebalancing(settings),
        )
        self.advising = Advising(self.sizing, self.rebalancing)
        self.metrics.also(self.advising)
        self.access = AccessLog(sys.stderr, settings.access_form())
        self.costs = Costs(Profiles(self.fleet, flagged(settings.vision)))
        self.reading = _reading(settings, self.costs)
        self.planner = self._planner(self.balancer)
        admission = Admission(derived.limits(settings))
        foresee = self._outlooks().of
        self.gate = Gate(admission, self.metrics, time.monotonic, foresee, derived.targets(settings))
        self.virtual: VirtualEncoder | None = None
        self.virtual_port = 0  # known once it listens
        self.dispatcher = self._dispatcher(settings)
        self.history = seat.history() if seat else history.alone()
        self.receipts = Receipts(settings.receipts, siblings)
        self.balancer.explains = settings.receipts > 0
        soon = [self.metrics.ended, self.access.ended]
        self.tracing = _tracing(settings, self.metrics)
        if self.tracing is not None:
            soon.append(self.tracing.ended)
        self.endings = Endings(soon)
        watchers = [self.receipts.ended, self.history.ended, self.endings.ended]
        self.standing = Standing(
            *(self.fleet, self.balancer, self.breakers, time.monotonic, self.endings.flush, siblings)
        )
        self.metrics.also(self.standing, self.standing.gather)
        self.metrics.known = lambda: {instance.netloc for instance in self.fleet}
        self.openai = api.OpenAI(
            *(self.fleet, self.sizing, self.dispatcher, self.upstream, self.guard, self.reading),
            *(self.metrics, watchers, self.tracing),
        )
        self.openai.names_engines = settings.admin_port is None
        self.port = seat.port if seat else settings.port
        self.admin_port = seat.admin_port if seat else settings.admin_port
        self.clients: Server | None = None  # once it listens

    def go_by(self, settings: ProxySettings) -> None:
        """Other settings from now on, where `reloading.LIVE` has them. Requests in flight end as they began. Raises
        ValueError if there are more instances than there is room for."""
        rights = derived.rights(settings)
        before, self.settings = self.settings, settings
        self.guard.go_by(rights)
        self.certificates.reread()
        self.balancer.choose_by(derived.policies(settings, self.balancer.rates))
        self.upstream.go_by(derived.timeouts(settings), settings.engine_key)
        self.reading.go_by(derived.request_limits(settings))
        self.breakers.thresholds = derived.thresholds(settings)
        self.health.probing = derived.probing(settings)
        self.switching.timeout = settings.switch_timeout
        self.rebalancing.interval = derived.rebalancing(settings)
        self.introduction.patience = derived.patience(settings)
        self.introduction.forward = settings.forward_authorization
        if _drawing(settings) != _drawing(before):  # another one knows no prompt that engines hold, and no freight
            self.planner = self._planner(self.balancer)
        self.gate.go_by(derived.limits(settings), self._outlooks().of, derived.targets(settings))
        self.dispatcher = self.openai.dispatcher = self._dispatcher(settings)
        self.membership.configure(settings.fleet())
        if self.clients is not None:
            self.clients.limits = derived.http_limits(settings)
        self.health.wake()

    def _planner(self, balancer: Balancer) -> Planner:
        inline, sight = _drawing(self.settings)
        return Planner(self.fleet, balancer, self.breakers, inline, self.families, sight)

    def _outlooks(self) -> Outlooks:
        planners = self.planner, self._planner(idle(self.balancer))
        return Outlooks(*planners, self.fleet, self.balancer, self.sizing, time.monotonic)

    def _dispatcher(self, settings: ProxySettings) -> Dispatcher:
        suspicion = Suspicion(dead=self.health.dead, opened=self.health.suspect)
        lessons = Lessons(self.balancer, self.costs)
        legs = Legs(self.speakers, self.upstream, self.metrics, time.monotonic, suspicion, lessons)
        planner = self.planner
        encoding = Encoding(legs, planner, Hedge(settings.hedge_after), settings.max_attempts)
        calls = EncoderCalls(legs, self.upstream)
        if self.virtual is not None:
            self.virtual.go_by(planner, calls, settings.max_attempts)
        elif settings.virtual_encoder_port is not None:
            self.virtual = VirtualEncoder(self.fleet, planner, legs, calls, settings.max_attempts, self.costs)
        over = Pictures(self.speakers).over if self.virtual is None else self.virtual.over
        return Dispatcher(planner, legs, encoding, self.metaserver, self.gate, derived.rules(settings), over)

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        return local_url(self.settings.host, self.port, self.certificates.scheme)

    @property
    def admin_url(self) -> str:
        """Where an admin on this machine does."""
        if self.admin_port is None:
            return self.url
        return local_url(self.settings.admin_host or self.settings.host, self.admin_port, self.certificates.scheme)

    def routes(self) -> list[Route]:
        settings = self.settings
        parts = self.fleet, self.membership, self.balancer, self.health, self.switching
        admin = Admin(*parts, self.guard, settings.dialect)
        profiling = Profiling(self.fleet, self.upstream, admin.authorized)
        watched = (self.metrics, self.advising, self.history, self.receipts)
        owners = Owners(self.fleet, admin, *watched, settings.workers)
        page = Page(Snapshots(owners, time.monotonic), admin)
        told = [*admin.routes(), *profiling.routes(), *self.advising.routes(), *self.receipts.routes(), *page.routes()]
        return [*self.openai.routes(), *told, post(callbacks.ROUTE, self.metaserver.handle, Audience.ALL)]

    @asynccontextmanager
    async def serving(self, patience: float = 0.0) -> AsyncIterator[Proxy]:
        """Listens within, as soon as engines can serve or after `patience` seconds; leaving lets requests in flight
        end, as the settings say, and tells the others why not."""
        async with Serving(self).running(patience):
            yield self

    def _told(self, instance: Instance, before: State) -> None:
        """Another worker has moved `instance`."""
        if instance.state is State.GONE:
            self.balancer.forget(instance)
        if before is State.DOWN or instance.state is State.GONE:
            self.breakers.forget(instance.url)  # another process, most likely


def _drawing(settings: ProxySettings) -> tuple[bool, Sight]:
    """All of the settings that plans are drawn by."""
    return settings.inline_encoding, derived.sight(settings)


def _tracing(settings: ProxySettings, metrics: Metrics) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    return Tracing(settings.otlp_endpoint, settings.trace_sample, metrics)


def _reading(settings: ProxySettings, costs: Costs) -> Reading:
    limits, rules = derived.request_limits(settings), settings.media_rules()
    measuring, inlining = None, None
    if settings.media_urls == "fetch":
        fetching = Fetching(rules, derived.fetches(settings))
        inlining = Inlining(fetching, derived.media_memory(settings), time.monotonic)
    elif settings.measure_urls != "never":
        resolver = None if settings.measure_urls == "all" else Resolver(rules)
        measuring = Measuring(costs, settings.measure_timeout, resolver)
    return Reading(costs, limits, measuring, inlining)


def local_url(host: str, port: int, scheme: str) -> str:
    """Where a client on this machine reaches who listens on `host`, which may be a wildcard."""
    host = "127.0.0.1" if host in ("", "0.0.0.0") else "::1" if host == "::" else host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
