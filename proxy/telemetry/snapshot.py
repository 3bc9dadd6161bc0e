"""What the page at /ui and `triptych top` show, as one JSON object: made when somebody asks, once a second at most.

Everything in it is told by its owner; nothing is measured here. All who watch one worker share what it has made.

    version, workers, ready            of this proxy
    locked                             whether draining needs the admin key
    in_flight, queued                  requests
    instances                          as GET /instances has them, with less of what their engines say
    curves    last                     the span, counted from boot, of the latest point
              span, window             seconds from one point to the next, and that each point tells of
              columns                  by name, the oldest point first; null where there is nothing to tell
    plan                               as GET /plan
    requests                           as GET /requests, the latest
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import orjson

from proxy.admin import Admin
from proxy.advice.advising import Advising
from proxy.balancer.fleet import Fleet
from proxy.core import Instance
from proxy.routing import router
from proxy.telemetry.history import SPAN_S, SPANS, WINDOW, Floats, History
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.receipts import Receipts

_EVERY_S = 1.0
_POINTS = SPANS - WINDOW
_RECENT = 4  # points for those who have the ones before, and the requests that ended since
_REQUESTS = 40
_SIGNIFICANT = 4  # digits


@dataclass(frozen=True, slots=True)
class Owners:
    """Of what is told."""

    fleet: Fleet
    admin: Admin
    metrics: Metrics
    advising: Advising
    history: History
    receipts: Receipts
    workers: int


class Snapshots:
    """One per worker."""

    def __init__(self, owners: Owners, clock: Callable[[], float]) -> None:
        self._owners = owners
        self._clock = clock
        self._lock = asyncio.Lock()
        self._due = 0.0
        self._at = 0.0  # when the present one was made
        self._last = 0  # the latest point
        self._told: dict[str, Any] = {}
        self._recent = b""
        self._whole: bytes | None = None  # made for the first who needs it
        self._version = version("triptych")

    async def get(self, since: int | None = None) -> bytes:
        """The present one. Who has an earlier one, whose last point was `since`, may get only what is new of points and
        requests."""
        async with self._lock:
            if (now := self._clock()) >= self._due:
                await self._make()
                self._due = now + _EVERY_S  # now: whoever asked may have left meanwhile, with nothing made
        if since is not None and self._last - _RECENT <= since <= self._last:
            return self._recent
        if self._whole is None:
            self._whole = self._rendered(_POINTS)
        return self._whole

    async def _make(self) -> None:
        owners = self._owners
        in_flight, queued = owners.metrics.requests_now()
        plan, requests = await owners.advising.told(), await owners.receipts.latest(_REQUESTS)
        self._at, self._whole = self._clock(), None
        self._told = {
            "version": self._version,
            "workers": owners.workers,
            "ready": router.servable(owners.fleet.census()),
            "locked": owners.admin.locked,
            "in_flight": in_flight,
            "queued": queued,
            "instances": [self._shown(instance) for instance in owners.fleet],
            "plan": plan,
            "requests": requests,
        }
        fresh = [one for one in requests if _end(one) > _end(requests[0]) - (_RECENT + 1) * SPAN_S]
        self._recent = self._rendered(_RECENT, requests=fresh)

    def _rendered(self, points: int, **less: Any) -> bytes:
        curves = self._owners.history.curves(self._at, points)
        self._last = curves.last
        columns = dict(zip(curves.columns, _short(np.array([*curves.columns.values()])), strict=True))
        told = {"last": curves.last, "span": SPAN_S, "window": SPAN_S * WINDOW, "columns": columns}
        return orjson.dumps({**self._told, **less, "curves": told}, option=orjson.OPT_SERIALIZE_NUMPY)

    def _shown(self, instance: Instance) -> dict[str, Any]:
        shown = self._owners.admin.shown(instance)
        del shown["facts"], shown["rate"]
        return shown | {name: instance.facts[name] for name in ("version", "labels") if name in instance.facts}


def _end(receipt: dict[str, Any]) -> float:
    return float(receipt["at"] + receipt["seconds"])


def _short(values: Floats) -> Floats:
    """With as many digits as anybody can see."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10 ** (_SIGNIFICANT - 1 - np.floor(np.log10(np.abs(values))))
        return np.where(values == 0, 0.0, np.round(values * scale) / scale)
