"""The HTTP face of an engine: common routes, request ids, errors, request metrics. No process, no signals: see
`engines.serve`.

Handlers use `read_json`, `json_response`, `check_model`, `request_id` and raise `EngineError`s, which become
OpenAI-shaped JSON at one edge, the middleware of `Scaffold`. A handler is cancelled when its client goes away. A
streaming handler that fails after `prepare` ends its stream itself (`sse(error.body(stage))`, no `[DONE]`);
whatever it lets escape cuts the connection.

Every engine answers /health, /info, /metrics and /v1/models; `Engine.routes()` adds the rest.
"""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import logging
import os
import re
import resource
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest

from engines.errors import BadRequest, EngineError, NotFound, ShuttingDown, TooLarge, Unauthorized
from engines.settings import EngineSettings

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
_REQUEST_ID = re.compile(r"[!-~]{1,256}")
_ID = web.RequestKey("request_id", str)
_PREPARED = web.RequestKey("prepared", web.StreamResponse)
_QUIET = frozenset({"/health", "/metrics", "/info", "/audit"})
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Engine(Protocol):
    """What the scaffold needs of an engine. All of it is called on the event loop.

    stage:    encode, prefill or decode: put into errors that name none.
    role:     encode, prefill, decode or both, for /info, /health and registration; may change while it serves.
    registry: holds the engine's own metrics (`triptych_…`); `serve` adds those of HTTP.
    routes:   the engine's own routes, asked once.
    info:     the engine's part of /info; cheap, JSON-able.
    drain:    returns when nothing is owed to other engines any more; cancelled when the grace time ends.
    check:    compares the books of memory with who holds it, at any time; RuntimeError says what does not balance.
    """

    @property
    def stage(self) -> str: ...
    @property
    def role(self) -> str: ...

    registry: CollectorRegistry

    def routes(self) -> Iterable[web.RouteDef]: ...
    def info(self) -> Mapping[str, Any]: ...
    async def drain(self) -> None: ...
    async def check(self) -> None: ...


# ---- for handlers


def request_id() -> str:
    """The id of the request being handled: the client's x-request-id, or a new one."""
    return _request_id.get()


async def read_json(request: web.Request) -> dict[str, Any]:
    """The request's body. Raises BadRequest unless it is one JSON object; TooLarge beyond --max-body-bytes."""
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}", code="invalid_json")
    return body


def json_response(data: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


DONE = b"data: [DONE]\n\n"
"""The last event of a stream that is whole."""


def sse(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def check_model(body: Mapping[str, Any], settings: EngineSettings) -> None:
    """Raises NotFound when the body names another model than the one served here; no name means this one."""
    name = body.get("model")
    if name is not None and name != settings.name:
        raise NotFound(f"this engine serves {settings.name!r}, not {name!r}", param="model", code="model_not_found")


# ---- the application


class Scaffold:
    """The web application around an engine: common routes, and the one edge where errors become responses."""

    def __init__(self, engine: Engine, settings: EngineSettings) -> None:
        self.engine = engine
        self.settings = settings
        self._key = None if settings.key is None else f"Bearer {settings.key}".encode()
        self._draining = False
        self._in_flight = 0
        self._all_answered = asyncio.Event()
        self._created = int(time.time())  # noqa: TID251 - a date for clients, no interval
        self._latency = Histogram(
            "triptych_http_request_seconds",
            "Seconds from request to end of response",
            ("route", "status"),
            registry=engine.registry,
            buckets=_SECONDS,
        )

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware], client_max_size=int(self.settings.max_body_bytes))
        app.on_response_prepare.append(_on_prepare)
        app.router.add_get("/health", self._health)
        app.router.add_get("/info", self._info)
        app.router.add_get("/audit", self._audit)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_routes(self.engine.routes())
        return app

    async def drain(self) -> None:
        """Refuse new work; return when what is in flight is answered and handed over, or --grace has passed."""
        self._draining = True
        try:
            async with asyncio.timeout(self.settings.grace):
                if self._in_flight:
                    await self._all_answered.wait()
                await self.engine.drain()
        except TimeoutError:
            log.warning("%d requests were not finished within --grace %g s", self._in_flight, self.settings.grace)

    async def _health(self, _request: web.Request) -> web.Response:
        return json_response({"role": self.engine.role})

    async def _info(self, _request: web.Request) -> web.Response:
        common = {
            "engine": "triptych",
            "version": version("triptych"),
            "role": self.engine.role,
            "model": self.settings.name,
            "pid": os.getpid(),
            "resident_bytes": resident_bytes(),
        }
        return json_response({**common, **self.engine.info()})

    async def _audit(self, _request: web.Request) -> web.Response:
        try:
            await self.engine.check()
        except RuntimeError as error:
            raise EngineError(f"memory is not accounted for: {error}", code="books_do_not_balance") from error
        return json_response({"balanced": True})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.engine.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, _request: web.Request) -> web.Response:
        entry = {"id": self.settings.name, "object": "model", "created": self._created, "owned_by": "triptych"}
        return json_response({"object": "list", "data": [entry]})

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_ID] = _accept_id(request.headers.get("x-request-id"))
        token = _request_id.set(request[_ID])
        started = time.monotonic()
        self._in_flight += 1
        status = 499  # what stands in the log when the handler is cancelled: the client closed the connection
        try:
            response = await self._answer(request, handler)
            status = response.status
            return response
        finally:
            self._in_flight -= 1
            if self._draining and self._in_flight == 0:
                self._all_answered.set()
            self._observe(request, status, time.monotonic() - started)
            _request_id.reset(token)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self._key is not None and request.path != "/health":
                _check_key(request, self._key)
            if self._draining and request.method == "POST":
                raise ShuttingDown("this engine is shutting down: send the request to another")
            return await handler(request)
        except EngineError as error:
            failure = error
        except web.HTTPException as error:
            failure = self._http_error(request, error)
        except Exception:
            log.exception("unexpected error")
            failure = EngineError("internal error: see this engine's log for the request id")
        if (begun := request.get(_PREPARED)) is not None:
            return _cut(request, begun, failure)
        if failure.status >= 500:
            log.warning("%r", failure)
        return json_response(failure.body(self.engine.stage), status=failure.status)

    def _http_error(self, request: web.Request, error: web.HTTPException) -> EngineError:
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            limit = int(self.settings.max_body_bytes)
            return TooLarge(f"the body is larger than {limit} bytes (--max-body-bytes)", code="body_too_large")
        if error.status in (404, 405):
            return NotFound(f"there is no {request.method} {request.path} on this engine")
        return BadRequest(error.reason)

    def _observe(self, request: web.Request, status: int, seconds: float) -> None:
        resource_ = request.match_info.route.resource
        route = resource_.canonical if resource_ else "unknown"
        self._latency.labels(route, str(status)).observe(seconds)
        level = logging.DEBUG if request.path in _QUIET else logging.INFO
        log.log(level, "%s %s %d %.1f ms", request.method, request.path, status, seconds * 1000)


def _check_key(request: web.Request, key: bytes) -> None:
    """Raises Unauthorized."""
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    if not hmac.compare_digest(given, key):
        raise Unauthorized("this engine needs its --key as a bearer token")


def _accept_id(offered: str | None) -> str:
    return offered if offered and _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex


async def _on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    request[_PREPARED] = response
    response.headers["x-request-id"] = request[_ID]


def _cut(request: web.Request, begun: web.StreamResponse, failure: EngineError) -> web.StreamResponse:
    """Break a response that has begun, so that no client takes the part it got for the whole."""
    log.error("a response broke after it had begun: %r", failure)
    if request.transport is not None:
        request.transport.abort()
    return begun


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # no /proc: the peak is the best there is
