"""What parts take of the settings: that each flag arrives, and how workers share what is for all."""

from __future__ import annotations

from math import inf
from typing import Any

from proxy import derived
from proxy.balancer.balance import PRIORS
from proxy.balancer.rates import Rates
from proxy.breaker import Thresholds
from proxy.core import ROLES, Role
from proxy.dispatch import Rules
from proxy.health import Probing
from proxy.intake.admission import Limits
from proxy.intake.gate import Targets
from proxy.intake.limits import Limits as RequestLimits
from proxy.joining.introduction import Patience
from proxy.media.addresses import Rules as AddressRules
from proxy.media.fetching import Bounds
from proxy.media.inlining import Memory
from proxy.planning.links import Links
from proxy.planning.prospects import Sight
from proxy.settings import ProxySettings
from proxy.upstream import Timeouts


def settings(**given: Any) -> ProxySettings:
    return ProxySettings(decode_servers_urls="http://d:1", **given)


def test_every_wait_arrives_where_it_is_kept() -> None:
    found = settings(
        connect_timeout=1, encode_timeout=2, prefill_timeout=3, first_token_timeout=4, stream_idle_timeout=5,
        answer_timeout=6, probe_interval=7, probe_timeout=8, probe_failures=9, warm_up_timeout=10, request_timeout=11,
        max_attempts=12, resume=True, breaker_failures=13, breaker_delay=14,
    )  # fmt: skip
    assert derived.timeouts(found) == Timeouts(1, 2, 3, 4, 5, 6)
    assert derived.probing(found) == Probing(7, 8, 9)
    assert derived.patience(found) == Patience(8, 10)
    assert derived.rules(found) == Rules(12, True, 11)
    assert derived.thresholds(found) == Thresholds(13, 14)


def test_targets_are_infinite_unless_they_are_set() -> None:
    assert derived.targets(settings()) == Targets(inf, inf, False)
    given = settings(ttft_target=1, tpot_target=2, max_embedding_bytes=3)
    assert derived.targets(given) == Targets(1, 2, True)


def test_workers_share_what_is_bounded_for_all() -> None:
    given = settings(workers=4, max_concurrent=10, max_queue=5, max_bytes_in_flight=4 << 30, max_embedding_bytes=7)
    assert derived.limits(given) == Limits(requests=3, nbytes=1 << 30, queue=2, patience=30.0)
    assert derived.sight(given).max_embedding_bytes == 2
    largest = settings(workers=4, max_bytes_in_flight=400, max_body_bytes=300)
    assert derived.limits(largest).nbytes == 300, "the largest body that is accepted fits in"
    assert derived.http_limits(largest).body_bytes == 300


def test_what_requests_may_hold_and_name() -> None:
    found = derived.request_limits(
        settings(max_json_depth=50, max_items=2, max_text_bytes=3, max_pixels=4, media_urls="refuse")
    )
    assert found == RequestLimits(50, 2, 3, 4, AddressRules(mode="refuse"))
    assert derived.http_limits(settings(max_header_bytes=5)).head_bytes == 5


def test_fetches_are_shared_and_their_size_is_not() -> None:
    found = derived.fetches(settings(workers=4, max_media_fetches=10, max_media_bytes=7, media_timeout=2))
    assert found == Bounds(7, 2.0, 3)
    given = settings(workers=4, media_cache_bytes=40, max_body_bytes=300, max_bytes_in_flight=4000)
    assert derived.media_memory(given) == Memory(10, 300, 1000)


def test_sight_is_as_far_as_policies_need() -> None:
    assert derived.sight(settings()) == Sight(weighed=frozenset({Role.ENCODE}))
    found = derived.sight(
        settings(policy="prefill=affinity", ttft_target=1, link_rates="rack=1", media_to_prefill="never")
    )
    assert found == Sight(frozenset({Role.ENCODE, Role.PREFILL}), True, False, None, Links.parse("rack=1"))


def test_each_role_has_a_policy_of_its_own() -> None:
    rates = {role: Rates(prior) for role, prior in PRIORS.items()}
    found = derived.policies(settings(policy="least_loaded,encode=round_robin"), rates)
    assert [type(found[role]).__name__ for role in ROLES] == ["RoundRobin", *["LeastLoaded"] * 3]
    assert len({id(policy) for policy in found.values()}) == len(ROLES)
