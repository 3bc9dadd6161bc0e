"""The capacity planner over HTTP: what the fleet is asked, which stage gives way first, what one more engine buys.

    GET /plan              the fewest engines of each role for the load of the last minutes
    GET /plan?engines=8    the split of eight engines that carries most

`switch` is the one engine that should turn from prefill to decode or back, as POST /instances/role has it do; null
where that would gain nothing. A rate that is not bounded, as of encoders that nobody needs, is null.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from proxy.advice.capacity import Advice, Carried, Offered, advise
from proxy.advice.rebalancing import Rebalancing
from proxy.advice.sizing import Sizing
from proxy.errors import BadRequest
from proxy.http.message import Response, json_response
from proxy.http.router import Audience, Route, get
from proxy.http.server import Request

_MOST = 10_000  # engines: their split takes a tenth of a second


class Advising(Collector):
    """Also two gauges, with nothing in them while nothing was asked."""

    def __init__(self, sizing: Sizing, rebalancing: Rebalancing) -> None:
        self._sizing = sizing
        self._rebalancing = rebalancing

    def routes(self) -> list[Route]:
        return [get("/plan", self.plan, Audience.ADMINS)]

    async def plan(self, request: Request) -> Response:
        """Always 200, see `told`."""
        return json_response(await self.told(_engines(request.query.get("engines"))))

    async def told(self, engines: int | None = None) -> dict[str, Any]:
        """The plan as JSON; without an advice, `reason` says why there is none."""
        offered, carried = self._sizing.offered(), self._sizing.carried()
        shown = _numbers(offered, carried)
        try:
            advice = await asyncio.to_thread(advise, offered, carried, engines)
        except ValueError as error:
            return {**shown, "reason": str(error)}
        switch = self._rebalancing.advice()
        return {**shown, **_advice(advice, offered), "switch": None if switch is None else switch.json}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        advised = GaugeMetricFamily(
            "triptych_advised_instances", "Fewest that carry the load of the last minutes, by role", labels=["role"]
        )
        busy = GaugeMetricFamily(
            "triptych_stage_utilisation", "Part of their time that instances are busy, by role", labels=["role"]
        )
        with suppress(ValueError):
            for need in advise(self._sizing.offered(), self._sizing.carried()).needs:
                advised.add_metric([need.role.label], need.advised)
                busy.add_metric([need.role.label], need.utilisation)
        yield from (advised, busy)


def _engines(asked: str | None) -> int | None:
    if asked is None:
        return None
    if not (asked.isascii() and asked.isdecimal() and 0 < int(asked[:9]) <= _MOST):
        raise BadRequest(f"engines must be a number up to {_MOST}, got {asked!r}", param="engines")
    return int(asked)


def _numbers(offered: Offered, carried: Carried) -> dict[str, Any]:
    """Per second."""
    return {
        "offered": {
            "requests": offered.requests,
            "encode_tokens": offered.encode,
            "encode_spread": offered.spread,
            "prompt_tokens": offered.prompt,
            "output_tokens": offered.output,
        },
        "one_engine_carries": {
            "encode_tokens": carried.encode,
            "prompt_tokens": carried.prefill,
            "output_tokens": carried.decode,
        },
    }


def _advice(advice: Advice, offered: Offered) -> dict[str, Any]:
    return {
        "carries": advice.carries,
        "would_carry": advice.would_carry,
        "bottleneck": advice.bottleneck.label,
        "ratio": ":".join(str(need.advised) for need in advice.needs),
        "roles": [
            {
                "role": need.role.label,
                "engines": need.engines,
                "utilisation": need.utilisation,
                "limit": need.limit,
                "carries": need.carries,
                "headroom": need.carries - offered.requests,
                "one_more": need.one_more,
                "advised": need.advised,
            }
            for need in advice.needs
        ],
    }
