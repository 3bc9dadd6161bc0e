"""When the proxy turns an engine by itself: not for little, not at once, not twice in a row, and never the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from proxy.advice.capacity import Carried, Offered
from proxy.advice.rebalancing import Rebalancing
from proxy.balancer.ledger import Ledger
from proxy.core import Role, Switch
from tests.fakes.deployment import Deployment
from tests.fakes.faults import Fault, Kind
from tests.fakes.media import chat
from tests.fakes.native import Turning
from tests.proxy.test_switching import of, rejoined, turning
from tests.support.waiting import until

P, D = Role.PREFILL, Role.DECODE
INTERVAL = 100.0
PRESSING = Offered(10.0, 0.0, 1000.0, 10.0)  # twice what one prefill engine carries
IDLE = Offered(0.0, 0.0, 0.0, 0.0)
LITTLE = Offered(1.0, 0.0, 100.0, 1.0)  # there is room
EVEN = Offered(10.0, 0.0, 450.0, 170.0)  # decode would be as strained as prefill is


@dataclass
class Sized:
    """Prefill engines carry 500 tokens/s, decode engines 100."""

    engines: Mapping[Role, int] = field(default_factory=lambda: {P: 1, D: 3})
    load: Offered = PRESSING

    def offered(self) -> Offered:
        return self.load

    def carried(self) -> Carried:
        return Carried(self.engines, 1.0, 500.0, 100.0)


def planner(d: Deployment, sized: Sized, interval: float | None = INTERVAL) -> tuple[Rebalancing, list[float]]:
    """And its clock, to be set."""
    now = [1000.0]
    found = Rebalancing(sized, d.proxy.fleet, d.proxy.balancer.ledger, d.proxy.switching, lambda: now[0], interval)
    return found, now


async def test_an_advice_is_followed_once_it_has_stood_and_then_not_for_a_while() -> None:
    async with turning("1p3d") as d:
        sized = Sized()
        rebalancing, now = planner(d, sized)
        assert rebalancing.due() is None, "it has just come up"
        now[0] += INTERVAL / 5
        assert rebalancing.due() is None
        sized.load = IDLE
        assert rebalancing.due() is None
        sized.load = PRESSING
        now[0] += INTERVAL
        assert rebalancing.due() is None, "it has not stood all the time"
        now[0] += INTERVAL / 4
        advice = rebalancing.due()
        assert advice is not None and (advice.move.source, advice.move.target) == (D, P)
        decode = d.decodes[0]
        d.proxy.fleet.begin(of(d, decode), Switch(P, now[0] + 1e9), "by hand")
        assert rebalancing.due() is None
        of(d, decode).turn(P)
        d.proxy.fleet.rejoin(of(d, decode), "turned")
        now[0] += INTERVAL * 0.9
        assert rebalancing.due() is None, "somebody has turned one a moment ago"
        now[0] += INTERVAL * 0.2
        assert rebalancing.due() is not None
        rebalancing.interval = None
        assert rebalancing.due() is None, "it was switched off"


@pytest.mark.parametrize("load", [IDLE, LITTLE, EVEN], ids=["idle", "little", "even"])
async def test_what_is_not_needed_is_not_done(load: Offered) -> None:
    async with turning("1p3d") as d:
        rebalancing, now = planner(d, Sized(load=load))
        assert rebalancing.due() is None
        now[0] += 10 * INTERVAL
        assert rebalancing.due() is None
        advice = rebalancing.advice()
        assert (advice is not None) is (load is not IDLE), "it is advised where it gains"


async def test_who_has_least_to_end_is_chosen_of_those_who_can_turn() -> None:
    async with turning("1p3d") as d:
        rebalancing, _ = planner(d, Sized())
        busy, idle, stranger = (of(d, engine) for engine in d.decodes)
        stranger.dialect = "vllm"
        ledger: Ledger = d.proxy.balancer.ledger
        with ledger.lease(busy, D, 100), ledger.lease(stranger, D, 1):
            advice = rebalancing.advice()
            assert advice is not None and advice.instance is idle
            assert advice.json == {"url": idle.url, "from": "decode", "to": "prefill", "would_carry": 9.0}
            idle.dialect = busy.dialect = "vllm"
            assert rebalancing.advice() is None


async def test_the_last_of_a_role_is_never_advised() -> None:
    async with turning("1p1d") as d:
        assert planner(d, Sized({P: 1, D: 1}))[0].advice() is None


async def test_the_proxy_turns_engines_by_itself_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.advice.rebalancing._LOOK_S", 0.01)
    settings = {"switch_roles": True, "switch_interval": 0.2}
    async with turning("1p3d", **settings) as d:
        sized = Sized()
        d.proxy.rebalancing._sizing = sized
        for engine in d.decodes:
            engine.refusal = Fault(Kind.STATUS, status=504)  # type: ignore[attr-defined]
        await until(lambda: sum(len(engine.asked) for engine in d.decodes) >= 2)  # type: ignore[attr-defined]
        assert all(engine.role == "decode" for engine in d.decodes)
        for engine in d.decodes:
            engine.refusal = None  # type: ignore[attr-defined]
        await until(lambda: any(engine.role == "prefill" for engine in d.decodes))
        sized.load = IDLE
        turned: Turning = next(engine for engine in d.decodes if engine.role == "prefill")  # type: ignore[assignment]
        await rejoined(d, turned, P)
        assert (await d.post(chat())).status == 200
