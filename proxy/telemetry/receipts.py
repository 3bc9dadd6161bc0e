"""Receipts of the latest requests: GET /requests (newest first, in short) and GET /requests/{id} (all that is known).

    in short                               and in full
    id, api, model, stream, items, status  key, route, reason, received, sent (bytes of the bodies)
    at        when it began, Unix time     admitted, drawn: seconds from `at`, as all other times below
    seconds, ttft    null: no first byte   timings          seconds by stage
    path, attempts, code                   error            stage and message
    prompt_tokens, output_tokens           events           [{at, name, detail}]
    legs      [{stage, instance, attempt, items, began, first, ended, outcome}]
                                           each leg's choices of an instance, see `record.Choice`: [{joined, unit, of
                                           (so many), candidates: [{instance, score, chosen}], the best first}]

Kept are the last so many requests that ended in each worker; whoever is asked asks the others. What they carried is not
kept: no prompt, no media, no key but for its name.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from typing import Any

import orjson

from proxy.errors import BadRequest, NotFound
from proxy.http.message import Response, json_response
from proxy.http.router import Audience, Route, get
from proxy.http.server import Request
from proxy.record import Choice, LegRecord, Record
from proxy.workers.siblings import Kind, Siblings

_ROUTE = "/requests"
_LIMIT, _MOST = 50, 1000
_PATIENCE_S = 1.0  # for another worker's answer
_CHOICES, _CANDIDATES = 16, 16  # shown of a leg, and of each of its choices


class Receipts:
    def __init__(self, most: int, siblings: Siblings | None = None) -> None:
        """`most`: that are kept; 0: none. `siblings`: who keeps others."""
        self._kept: deque[Record] = deque(maxlen=most)
        self._siblings = siblings
        self._boot = _boot()  # once: however often it is told, a receipt is the same

    def __repr__(self) -> str:
        return f"<Receipts {len(self._kept)} of {self._kept.maxlen}>"

    def routes(self) -> list[Route]:
        return [get(_ROUTE, self.recent, Audience.ADMINS), get(f"{_ROUTE}/", self.one, Audience.ADMINS)]

    def ended(self, record: Record) -> None:
        """A request has ended."""
        self._kept.append(record)

    async def recent(self, request: Request) -> Response:
        """GET /requests?limit=50. Raises BadRequest."""
        return json_response({"requests": await self.latest(_limit(request.query.get("limit")))})

    async def latest(self, limit: int) -> list[dict[str, Any]]:
        """So many of all workers, in short, the one that ended last first."""
        found = self._latest(limit)
        for answer in await self._others({"limit": limit}):
            found += answer
        found.sort(key=lambda receipt: -(receipt["at"] + receipt["seconds"]))
        return found[:limit]

    async def one(self, request: Request) -> Response:
        """GET /requests/{id}: the latest that went by that x-request-id. Raises NotFound."""
        name = request.path.removeprefix(f"{_ROUTE}/")
        found = self._named(name)
        for answer in await self._others({"id": name}):
            found += answer
        if not found:
            raise NotFound(f"no receipt of {name!r}: it has not ended, or is too long ago (--receipts)", param="id")
        return json_response(max(found, key=lambda receipt: receipt["at"]))

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Another worker's question: {"limit"} or {"id"}. A list of receipts."""
        asked = orjson.loads(body)
        return 200, orjson.dumps(self._named(asked["id"]) if "id" in asked else self._latest(asked["limit"]))

    async def _others(self, asked: dict[str, Any]) -> list[list[dict[str, Any]]]:
        if self._siblings is None:
            return []
        answers = await self._siblings.ask_all(Kind.RECEIPTS, orjson.dumps(asked), _PATIENCE_S)
        return [orjson.loads(answer) for answer in answers]

    def _latest(self, limit: int) -> list[dict[str, Any]]:
        return [short(record, self._boot) for record in islice(reversed(self._kept), limit)]

    def _named(self, name: str) -> list[dict[str, Any]]:
        """The latest one of this worker, if it has any."""
        return [full(record, self._boot) for record in islice((r for r in reversed(self._kept) if r.id == name), 1)]


def short(record: Record, boot: float) -> dict[str, Any]:
    """`boot`: the Unix time at which the clock of `record` stood at 0."""
    return {
        "id": record.id,
        "at": boot + record.began,
        "api": record.api,
        "model": record.model,
        "stream": record.stream,
        "items": record.items,
        "status": record.status,
        "code": record.code or None,
        "path": record.path,
        "attempts": record.attempts,
        "seconds": record.ended - record.began,
        "ttft": record.first - record.began if record.first else None,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "legs": [_leg(leg, record) for leg in record.legs],
    }


def full(record: Record, boot: float) -> dict[str, Any]:
    """The same, with all the rest."""
    return {
        **short(record, boot),
        "key": record.caller or None,
        "route": record.route,
        "reason": record.reason,
        "received": record.received,
        "sent": record.sent,
        "admitted": _since(record, record.admitted),
        "drawn": _since(record, record.drawn),
        "timings": record.timings,
        "error": record.error or None,
        "events": [{**event._asdict(), "at": event.at - record.began} for event in record.events],
        "legs": [{**_leg(leg, record), "choices": _choices(leg)} for leg in record.legs],
    }


def _leg(leg: LegRecord, record: Record) -> dict[str, Any]:
    return {
        "stage": leg.stage,
        "instance": leg.netloc,
        "attempt": leg.attempt,
        "items": leg.items,
        "began": leg.began - record.began,
        "first": _since(record, leg.first),
        "ended": _since(record, leg.ended),
        "outcome": leg.outcome or None,
    }


def _choices(leg: LegRecord) -> list[dict[str, Any]]:
    return [
        {"joined": choice.joined, "unit": choice.unit, "of": len(choice.urls), "candidates": _best(choice, leg.url)}
        for choice in leg.choices[:_CHOICES]
    ]


def _best(choice: Choice, chosen: str) -> list[dict[str, Any]]:
    """Some of the candidates, the best first, and the chosen one in any case."""
    ranked = sorted(zip(map(float, choice.scores), choice.urls, strict=True))
    shown = ranked[:_CANDIDATES] + [one for one in ranked[_CANDIDATES:] if one[1] == chosen]
    return [{"instance": url.partition("://")[2], "score": score, "chosen": url == chosen} for score, url in shown]


def _since(record: Record, at: float) -> float | None:
    return at - record.began if at else None


def _boot() -> float:
    return time.time() - time.monotonic()  # noqa: TID251 - a receipt tells the time of day


def _limit(asked: str | None) -> int:
    if asked is None:
        return _LIMIT
    if not (asked.isascii() and asked.isdecimal() and 0 < int(asked[:9]) <= _MOST):
        raise BadRequest(f"limit must be 1 to {_MOST}, got {asked!r}", param="limit")
    return int(asked)
