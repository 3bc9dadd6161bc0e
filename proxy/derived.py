"""What each part of the proxy takes of the settings: frozen values, made here and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from proxy.auth.guard import Rights
from proxy.auth.keys import Keys
from proxy.balancer import POLICIES
from proxy.balancer.policy import Means, Policy
from proxy.balancer.rates import Rates
from proxy.breaker import Thresholds
from proxy.core import Role
from proxy.dialects.base import Media
from proxy.dispatch import Rules
from proxy.health import Probing
from proxy.http.server import Limits as HttpLimits
from proxy.intake.admission import Limits
from proxy.intake.gate import Targets
from proxy.intake.limits import Limits as RequestLimits
from proxy.joining.introduction import Patience
from proxy.media.fetching import Bounds
from proxy.media.inlining import Memory
from proxy.planning.links import Links
from proxy.planning.prospects import Sight
from proxy.settings import ProxySettings
from proxy.tls import Certificates, Connector, Files, Listener
from proxy.upstream import Timeouts


def policies(settings: ProxySettings, rates: Mapping[Role, Rates]) -> dict[Role, Policy]:
    """New ones, which go by `rates`."""
    named = settings.policies().items()
    return {role: POLICIES[name](Means(role, rates[role], random.random)) for role, name in named}


def timeouts(settings: ProxySettings) -> Timeouts:
    return Timeouts(
        connect=settings.connect_timeout,
        encode=settings.encode_timeout,
        prefill=settings.prefill_timeout,
        first_token=settings.first_token_timeout,
        stream_idle=settings.stream_idle_timeout,
        answer=settings.answer_timeout,
    )


def thresholds(settings: ProxySettings) -> Thresholds:
    return Thresholds(settings.breaker_failures, settings.breaker_delay)


def probing(settings: ProxySettings) -> Probing:
    return Probing(settings.probe_interval, settings.probe_timeout, settings.probe_failures)


def patience(settings: ProxySettings) -> Patience:
    return Patience(settings.probe_timeout, settings.warm_up_timeout)


def rebalancing(settings: ProxySettings) -> float | None:
    """Seconds between two switches of roles; None: the proxy makes none by itself."""
    return settings.switch_interval if settings.switch_roles else None


def rules(settings: ProxySettings) -> Rules:
    return Rules(settings.max_attempts, settings.resume, settings.request_timeout)


def targets(settings: ProxySettings) -> Targets:
    return Targets(settings.ttft_target or inf, settings.tpot_target or inf, settings.max_embedding_bytes is not None)


def limits(settings: ProxySettings) -> Limits:
    """An equal share for each worker: connections are dealt to them evenly, and nobody asks another for a place."""
    share = settings.workers
    return Limits(
        requests=-(-settings.max_concurrent // share),
        nbytes=min(settings.max_bytes_in_flight, max(settings.max_bytes_in_flight // share, settings.max_body_bytes)),
        queue=-(-settings.max_queue // share),
        patience=settings.queue_timeout,
    )


def http_limits(settings: ProxySettings) -> HttpLimits:
    return HttpLimits(head_bytes=settings.max_header_bytes, body_bytes=settings.max_body_bytes)


def request_limits(settings: ProxySettings) -> RequestLimits:
    return RequestLimits(
        depth=settings.max_json_depth,
        items=settings.max_items,
        text_bytes=settings.max_text_bytes,
        pixels=settings.max_pixels,
        rules=settings.media_rules(),
    )


def fetches(settings: ProxySettings) -> Bounds:
    """An equal share for each worker."""
    at_once = -(-settings.max_media_fetches // settings.workers)
    return Bounds(settings.max_media_bytes, settings.media_timeout, at_once)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What files hold that settings name. Whoever is forked has them, whatever becomes of the files."""

    rights: Rights
    certificates: Certificates

    @classmethod
    def read(cls, settings: ProxySettings) -> Secrets:
        """Raises ValueError naming the file at fault."""
        return cls(rights(settings), certificates(settings))


def media_memory(settings: ProxySettings) -> Memory:
    """Requests hold as much of fetched media as they may hold of bodies."""
    kept = settings.media_cache_bytes // settings.workers
    return Memory(kept, settings.max_body_bytes, limits(settings).nbytes)


def rights(settings: ProxySettings) -> Rights:
    """With the keys that files hold now. Raises ValueError naming the file."""
    return Rights(
        keys=None if settings.api_keys is None else _keys(settings.api_keys),
        admin=settings.admin_secret(),
        register=settings.register_key,
        proxies=settings.proxies(),
        forward=settings.forward_authorization,
        trust_client=settings.trust_client_identity,
        salt=settings.tenant_salt,
        tenant_header=settings.tenant_header,
    )


def _keys(file: Path) -> Keys:
    try:
        return Keys.parse(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--api-keys: {file}: {error}") from None


def certificates(settings: ProxySettings) -> Certificates:
    """Raises ValueError naming the file at fault."""
    clients = Files(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    engines = Files(settings.engine_cert, settings.engine_cert_key, settings.engine_ca)
    return Certificates(
        clients=None if clients.cert is None else Listener(clients),
        admins=None if clients.cert is None else Listener(replace(clients, ca=None)),
        engines=None if engines == Files() else Connector(engines),
    )


def sight(settings: ProxySettings) -> Sight:
    """Bytes are bounded by an equal share for each worker, as requests are."""
    most = settings.max_embedding_bytes
    return Sight(
        weighed=frozenset(role for role, policy in settings.policies().items() if policy == "affinity"),
        always=settings.ttft_target is not None,
        media_anyway=settings.media_to_prefill is not Media.NEVER,
        max_embedding_bytes=None if most is None else -(-most // settings.workers),
        links=Links.parse(settings.link_rates),
    )
