"""What is foreseen of a request, and the path that follows from it."""

from __future__ import annotations

from math import ceil

import pytest

from proxy.balancer.pool import Pool
from proxy.core import BOTH, Path, Role
from proxy.planning.links import HOP
from proxy.planning.prospects import Prospects, unique
from proxy.routing.router import Route
from tests.support.fleets import Labelled, job

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE
ROUTE = Route(Path.E_PD, "1 item, combined engines only", (Path.EPD,))


def combined(encode: float = 1e-4, both: float = 1e-4) -> Labelled:
    """Two encoders and two combined engines, with known rates unless they are 0."""
    found = Labelled()
    found.add(E, 2, rate=encode)
    found.add(BOTH, 2, rate=both)
    return found


def first_token(found: Labelled, path: Path, *works: int, text: int = 100) -> float:
    def pool(role: Role) -> Pool:
        return Pool(found.fleet.ready(role))

    return Prospects(found.balancer).first_token(path, job(*works, text=text, nbytes=0), pool)


def decided(found: Labelled, *works: int, text: int = 100, route: Route = ROUTE) -> tuple[Path, str]:
    def pool(role: Role) -> Pool:
        return Pool(found.fleet.ready(role))

    return Prospects(found.balancer).decided(route, job(*works, text=text, nbytes=0), "native", pool)


def test_embeddings_and_queue_are_waited_for_together_and_inline_encoding_comes_on_top() -> None:
    found = combined()
    assert first_token(found, Path.PD, text=1000) == pytest.approx(0.1)
    assert first_token(found, Path.E_PD, 1000) == pytest.approx(HOP + 0.1 + 0.11)
    assert first_token(found, Path.E_PD, 1000, 1000) == pytest.approx(HOP + 0.1 + 0.21), "one each"
    assert first_token(found, Path.E_PD, 1000, 1000, 1000) == pytest.approx(HOP + 0.15 + 0.31)
    assert first_token(found, Path.EPD, 1000) == pytest.approx(0.1 + 0.11)
    for instance in found.fleet.ready(BOTH):
        found.balancer.ledger.lease(instance, BOTH, 1000)
    assert first_token(found, Path.E_PD, 1000) == pytest.approx(HOP + 0.1 + 0.11), "meanwhile"
    assert first_token(found, Path.EPD, 1000) == pytest.approx(0.2 + 0.11)


def test_the_sooner_path_is_taken_once_something_is_known() -> None:
    assert decided(combined(encode=0, both=0), 1000) == (Path.E_PD, ROUTE.reason)
    assert decided(combined(both=0), 1000) == (Path.E_PD, ROUTE.reason)
    busy = combined()
    for instance in busy.fleet.ready(E):
        busy.balancer.ledger.lease(instance, E, 10_000)
    assert decided(busy, 1000) == (Path.EPD, "1 item, 210 ms inline, 1212 ms encoded apart")
    found = combined()
    assert decided(found, 1000, 1000) == (Path.E_PD, "2 items, 312 ms encoded apart, 410 ms inline")


def test_text_has_a_choice_where_pairs_and_combined_engines_are() -> None:
    found = Labelled()
    found.add(P, rate=1e-4, load=9000)
    found.add(D, rate=1e-4)
    found.add(BOTH, rate=1e-4)
    route = Route(Path.P_D, "text only, prefill and decode apart", (Path.PD,))
    assert decided(found, text=1000, route=route) == (Path.PD, "text only, 100 ms combined, 1000 ms apart")


def test_an_item_that_an_encoder_holds_is_soon_there() -> None:
    found = combined()
    before = first_token(found, Path.E_PD, 1000)
    found.balancer.holders.placed(found.fleet.ready(E)[0].url, "i0-1000", 1000)
    assert first_token(found, Path.E_PD, 1000) < before - 0.09


def test_what_a_leg_asks_for_is_prompt_and_output_and_encoding_where_it_encodes() -> None:
    found = combined(encode=2e-4)
    prospects, asked = Prospects(found.balancer), job(1000, text=100, output=16)
    demands = [
        prospects.demand(path, role, asked) for path, role in ((Path.E_P_D, P), (Path.E_P_D, D), (Path.E_PD, BOTH))
    ]
    assert [(demand.work, demand.room) for demand in demands] == [(1100, 0), (1116, 1116), (1116, 1116)]
    inline = prospects.demand(Path.EPD, BOTH, asked)
    assert inline.work == 1116 + 2000 and prospects.demand(Path.EP_D, D, asked).work == 1116
    assert prospects.inline_work(asked.items, P) == ceil(1000 * 2e-4 / found.rates[P].typical)


def test_a_charged_plan_takes_what_was_before_it_and_its_own() -> None:
    found = combined()
    prospects, asked, (one, _) = Prospects(found.balancer), job(text=1000, output=500), found.fleet.ready(BOTH)
    found.balancer.ledger.lease(one, BOTH, 2000)
    lease = found.balancer.ledger.lease(one, BOTH, 1500)
    assert prospects.expected(asked, BOTH, one.url, lease.tokens, 0.0) == pytest.approx(0.2 + 0.1)
    assert prospects.expected(asked, BOTH, one.url, lease.tokens, 0.5) == pytest.approx(0.5 + 0.1)
    encoder = found.fleet.ready(E)[0]
    found.balancer.ledger.lease(encoder, E, 3000)
    assert prospects.ready([encoder.url]) == pytest.approx(HOP + 0.3) and prospects.ready([]) == 0.0


def test_equal_items_are_one_and_the_largest_is_first() -> None:
    items = job(10, 30, 30, 20).items
    assert [item.index for item in unique([*items, items[0]])] == [1, 2, 3, 0]
